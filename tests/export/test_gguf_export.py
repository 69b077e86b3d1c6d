"""GGUF files in llama.cpp: the same text in tokens, the same tensors, the same next tokens."""

import json
import re
import subprocess
import sys
import urllib.request
from importlib.metadata import version

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jobs.export import export
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.export import gguf as exporter
from pipeline.export.vocabulary import write_vocabulary
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import make_student
from pipeline.package.package import load, read_package, write_package
from pipeline.quant.frozen import FrozenTensors, freeze
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ROOT
from tests.packages import NO_METRICS, WIDE, package, packed_logits, signed, with_scale

PROBE = "The 3 dogs didn't bark at Ünal's café, did they?  No\n\n  -- 1234 times: <|endoftext|> done \t日本."
FACTS = {"name": "x", "teacher_bytes": 1000, "lineage": {}, "metrics": NO_METRICS}


def types_of(out):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}


def tokenize(file, text):
    server = exporter.open_server(file, 1)
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


@pytest.mark.parametrize(("family", "block"), [("gpt2", "TQ2_0"), ("llama", "Q2_K"), ("llama in groups", "Q4_0")])
def test_a_trained_model_is_the_same_in_llama_cpp(trained, family, block, tmp_path):
    """Tensors to the scale's rounding; distributions over 20 texts, activations in fp32 and as llama.cpp has them."""
    package, out = trained(family), tmp_path / "out"
    verdict = export(str(package), "gguf", out, None, 1, Resources(), Console(quiet=True))
    assert verdict["reasons"] == []
    assert (verdict["prompts"], verdict["steps"]) == (20, 20 * 79)
    assert verdict["exact"]["kl_nats"] < 1e-6
    assert 1e-6 < verdict["as_it_runs"]["kl_nats"] < 1e-4
    assert verdict["runtime"] == f"xllamacpp {version('xllamacpp')}"
    frozen, _, _ = read_package(package)
    assert verdict["tensors_read_back"] == len(frozen.codes)
    assert verdict["read_back_error"] < 2**-11
    assert json.loads((out / "verdict.json").read_text())["digest"] == frozen.digest()
    kinds = types_of(out)
    assert {kinds[name] for name in kinds if name.startswith("blk") and kinds[name] != "F32"} == {block}
    assert kinds["token_embd.weight"] == ("Q2_K" if family == "llama in groups" else block)
    assert tokenize(out / "model.gguf", PROBE) == AutoTokenizer.from_pretrained(package)(PROBE).input_ids


def test_of_a_large_vocabulary_whole_distributions_are_told_at_some_steps(trained, tmp_path, monkeypatch):
    assert exporter.whole_steps(4096, 79).all()
    assert exporter.whole_steps(2**20, 79).sum() == 1
    exporter.write(trained("gpt2"), tmp_path)
    logits, ids = exporter.open_logits(tmp_path, 1), list(range(5, 84))
    of_all = logits(ids)
    monkeypatch.setattr(exporter, "MOST_PROBABILITIES", 20 * 79 * 300 // 10)
    of_some, whole = logits(ids), exporter.whole_steps(300, 79)
    assert np.flatnonzero(whole).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    np.testing.assert_array_equal(of_some[whole], of_all[whole])
    np.testing.assert_array_equal(of_some.argmax(axis=1), of_all.argmax(axis=1))
    assert np.isfinite(of_some[~whole]).sum() == 71
    verdict = export(str(trained("gpt2")), "gguf", tmp_path / "out", None, 1, Resources(), Console(quiet=True))
    assert (verdict["steps"], verdict["whole_steps"], verdict["reasons"]) == (1580, 160, [])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_with_fp32_activations_on_both_sides_logits_agree_to_a_thousandth(trained, family, tmp_path):
    """The weights that the codes stand for as fp32 tensors, so that llama.cpp has nothing to quantize for."""
    frozen, config, _ = read_package(trained(family))
    dense = FrozenTensors(rest={**frozen.rest, **{f"{name}.weight": frozen.weight(name) for name in frozen.codes}})
    folder, out = tmp_path / "package", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    for path in trained(family).glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    write_package(folder, dense, config, Quant(bits="32-32-32"), "dense", family, FACTS)
    assert exporter.write(folder, out) == []
    assert set(types_of(out).values()) == {"F32"}
    ids = torch.randint(300, (40,), generator=torch.Generator().manual_seed(0))
    ours = torch.log_softmax(load(folder)(ids[None]).logits[0], -1).numpy()
    assert np.abs(ours - exporter.open_logits(out, 1)(ids.tolist())).max() < 1e-3


def test_log_probabilities_are_all_there_whatever_is_likely(trained, tmp_path):
    """Also where the likeliest token ends the text or is half a character."""
    exporter.write(trained("gpt2"), tmp_path)
    rows = exporter.open_logits(tmp_path, 1)(list(range(60)))
    assert rows.shape == (60, 300)
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(1), 1, atol=1e-4)


def test_a_server_that_nothing_was_asked_of_ends(trained, tmp_path):
    """In a process of its own: one that does not end hangs where no signal is heard."""
    exporter.write(trained("gpt2"), tmp_path)
    often = "import sys; from pathlib import Path; from pipeline.export.gguf import open_server\n"
    often += "for _ in range(50): open_server(Path(sys.argv[1]), 1)"
    subprocess.run([sys.executable, "-c", often, tmp_path / exporter.FILE], cwd=ROOT, timeout=300, check=True)


@pytest.mark.parametrize(
    ("bits", "quantizer"), [("4-8-8", "lsq"), ("2-8-8", "lsq"), ("8-8-8", "seq"), ("32-4-8", "seq")]
)
@torch.no_grad()
def test_every_grid_runs_in_rows_of_any_length(trained, tmp_path, bits, quantizer):
    """Rows of 96 fit blocks of 32; rows of 80 fit none and go to F16, which is said with their bytes."""
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir(), out.mkdir()
    for path in trained("gpt2").glob("tokenizer*"):
        (package / path.name).write_bytes(path.read_bytes())
    source = {"architecture": "gpt2", "n_layer": 1, "n_embd": 96, "n_head": 4, "n_positions": 80, "n_inner": 80}
    model, quant = build(read_config(source, vocab_size=300), seed=1), Quant(bits=bits, quantizer=quantizer)
    make_student(model, quant.spec(), family_named("gpt2"))
    frozen = freeze(model, quant.spec(), torch.float32, torch.float32)
    write_package(package, frozen, model.config, quant, "dense", "gpt2", FACTS)
    notes, kinds = exporter.write(package, out), types_of(out)
    if bits != "32-4-8":
        assert kinds["blk.0.ffn_down.weight"] == "F16"
        assert any(
            "transformer.h.0.mlp.c_proj" in note and f"96 rows are F16, {96 * 80 * 2:,} bytes" in note for note in notes
        )
    assert exporter.read_back(package, out)[0] <= 2**-10
    ids = list(range(20, 60))
    ours = torch.log_softmax(load(package)(torch.tensor([ids])).logits[0], -1).numpy()
    assert np.abs(ours - exporter.open_logits(out, 1)(ids)).max() < 0.02


@pytest.mark.parametrize(
    ("size", "quant", "block"),
    [
        (32, {"bits": "4-4-8", "quantizer": "lsq", "scale_dtype": "float16"}, "Q4_0"),
        (64, {"bits": "2-2-8", "quantizer": "quantgpt"}, "Q4_0"),
        (128, {"bits": "4-4-8", "quantizer": "seq"}, "Q8_0"),
    ],
    ids=str,
)
def test_a_scale_a_group_is_the_same_in_llama_cpp(tmp_path, size, quant, block):
    """Also of rows that are put in another order; of a matrix whose row is one group there is one scale a row."""
    source = {**WIDE["llama"], "hidden_size": 256, "intermediate_size": 128}
    folder = package(tmp_path / "package", source, granularity={"per_group": size}, **quant)
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    assert exporter.write(folder, tmp_path) == []
    kinds = types_of(tmp_path)
    assert {kinds[name] for name in kinds if re.fullmatch(r"blk.*(attn_[qkvo]|gate|up).*t", name)} >= {block}
    assert exporter.read_back(folder, tmp_path)[0] < 2**-10
    ids = list(range(20, 60))
    wanted = torch.tensor(packed_logits(folder, ids, activations=32)).log_softmax(-1).numpy()
    found = exporter.open_in_fp32(folder, tmp_path, 1)(ids)
    assert wanted.std() > 0.2
    assert np.abs(found - wanted).max() < 0.02


def test_of_a_group_whose_scale_fp16_does_not_hold_the_matrix_is_not_held_as_codes(tmp_path):
    """It is written in floating point with its bytes named, and reads back as near."""
    name = "model.layers.0.mlp.up_proj"
    folder = with_scale(package(tmp_path / "package", WIDE["llama"], granularity={"per_group": 32}), name, 1e-9)
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    (note,) = exporter.write(folder, tmp_path)
    assert note == f"{name}: Q4_0 has scales of fp16, which does not hold 1e-09, so its 256 rows are F32, 131,072 bytes"
    assert exporter.read_back(folder, tmp_path)[0] < 2**-10


@pytest.fixture
def pieces(corpus, tmp_path):
    """A tokenizer as Llama's: no cut into words, spaces as ▁, bytes for what it does not know."""
    byte = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *byte], show_progress=False)
    words = [word for line in corpus.read_text().splitlines() for word in line.split()]
    tokenizer.train_from_iterator([f"{word} " for word in words], trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(tmp_path / "pieces")
    return tmp_path / "pieces"


def exported(folder, out):
    """A one-layer Llama with the tokenizer of a folder, in which it is packed, as a GGUF file."""
    source = {
        "architecture": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, quant = build(read_config(source, vocab_size=len(tokenizer)), seed=1), Quant(bits="8-8-8")
    make_student(model, quant.spec(), family_named("llama"))
    frozen = freeze(model, quant.spec(), torch.float32, torch.float32)
    write_package(folder, frozen, model.config, quant, "dense", "llama", FACTS)
    exporter.write(folder, out)
    return tokenizer


def test_a_sentencepiece_like_tokenizer_splits_as_transformers_does(pieces, corpus, tmp_path):
    tokenizer = exported(pieces, tmp_path)
    text = corpus.read_text()[:400].replace("\n", " ") + " Ünal 7"
    assert tokenize(tmp_path / "model.gguf", text) == tokenizer(text).input_ids


SPLIT = (  # from the tokenizer.json of Llama 3; Qwen 2's has no {1,3}
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "regex", "takes_words", "normalizer"),
    [
        ("llama-bpe", SPLIT, True, None),
        ("dbrx", SPLIT, False, None),
        ("qwen2", SPLIT.replace("{1,3}", ""), False, normalizers.NFC()),
    ],
)
def test_a_tokenizer_as_llama_3_or_qwen_splits_as_transformers_does(
    corpus, tmp_path, name, regex, takes_words, normalizer
):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([corpus.read_text(), "12 123456 1234 didn't they're\n\n  -- x" * 200], trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["ignore_merges"] = takes_words
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "words")
    words = exported(tmp_path / "words", tmp_path)
    pre = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents()
    assert pre == name
    assert tokenize(tmp_path / "model.gguf", PROBE) == words(PROBE).input_ids
    assert len(words("1234567").input_ids) == (7 if name == "qwen2" else 3)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    for source, message in (
        ({"architecture": "bart"}, "takes gemma2, .*, qwen3, smollm3 models, not bart"),
        ({"architecture": "gpt2", "activation_function": "relu"}, "computes gelu_new, not the activation 'relu'"),
        ({"architecture": "llama", "mlp_bias": True}, "with mlp_bias False, not True"),
        (
            {"architecture": "qwen3", "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type default, dynamic, linear, yarn, not 'proportional'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            exporter.check(read_config(source, vocab_size=300))


def test_an_unknown_tokenizer_is_refused(checkpoint, tmp_path):
    for path in checkpoint.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    with pytest.raises(ConfigError, match=r"cannot be exported to GGUF: it cuts text by .*Lowercase"):
        write_vocabulary(writer, tmp_path, 300)
