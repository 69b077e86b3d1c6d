"""A model in a GGUF file is a teacher like any other: loaded in fp32, of every type of tensors, and saved again; what
transformers would read otherwise than it is written is refused."""

import re
import struct
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoTokenizer

from pipeline.errors import ConfigError
from pipeline.export import gguf as exporter
from pipeline.export.dequantized import plain_model
from pipeline.flow.inspection import inspect_model
from pipeline.flow.plan import plan_run
from pipeline.flow.preflight import check_checkpoint, check_gguf_file, pin
from pipeline.models import values as numbers_in
from pipeline.models.blocks import rope_types
from pipeline.models.build import load_model, read_config, skeleton
from pipeline.models.family import families
from pipeline.models.gguf_file import check_fits, check_readable, told_of_words
from pipeline.package.package import read_package
from pipeline.tasks.tokenizers import read_tokenizer, train_bpe
from tests.family_models import ANGLES, IN_LLAMA_CPP, LLAMA_LIKE
from tests.packages import package, signed

OF_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
HIDDEN, INNER, HEADS, VOCABULARY = 256, 512, 4, 40  # rows of whole blocks of every type
MATRICES = {
    "attn_q": ("self_attn.q_proj", HIDDEN, HIDDEN),
    "attn_k": ("self_attn.k_proj", HIDDEN, HIDDEN),
    "attn_v": ("self_attn.v_proj", HIDDEN, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HIDDEN),
    "ffn_gate": ("mlp.gate_proj", INNER, HIDDEN),
    "ffn_up": ("mlp.up_proj", INNER, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, INNER),
}
FLOATS = ("F32", "F16", "BF16")
BLOCKS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "IQ4_NL",
    "IQ4_XS",
)
INDEXED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
TYPES = (*FLOATS, *BLOCKS, *INDEXED)


def packed(random, rows, columns, kind):
    """A tensor of a type, of values where it has any: blocks of which each byte is one that small numbers have."""
    if kind.name in FLOATS:
        values = random.normal(size=(rows, columns)).astype(np.float32)
        return gguf.quants.quantize(values, kind)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    return random.integers(0, 60, (rows, columns // size * width)).astype(np.uint8)


def write(path, kinds=("F32",), architecture="llama", settings=(), left_out=(), more=(), changed=None):
    """A Llama of as many layers as hold all types, and its matrices as numbers by their name in the file."""
    random, layers = np.random.default_rng(0), -(-len(kinds) // len(MATRICES))
    writer = gguf.GGUFWriter(path, architecture)
    for setting, value in {
        "block_count": layers,
        "context_length": 16,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "head_count": HEADS,
        "head_count_kv": HEADS,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": VOCABULARY,
    }.items():
        getattr(writer, f"add_{setting}")(value)
    for key, kind, value in settings:
        getattr(writer, f"add_{kind}")(key, value)
    norms = ["output_norm", *(f"blk.{layer}.{name}_norm" for layer in range(layers) for name in ("attn", "ffn"))]
    tensors = {f"{name}.weight": (np.ones(HIDDEN, np.float32), None) for name in norms}
    tensors["token_embd.weight"] = random.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32), None
    tensors |= {name: (np.ones(HIDDEN, np.float32), None) for name in more}
    numbers = {}
    for place in range(layers * len(MATRICES)):
        layer, (name, (ours, *shape)) = place // len(MATRICES), list(MATRICES.items())[place % len(MATRICES)]
        kind = GGMLQuantizationType[kinds[place % len(kinds)]]
        data = packed(random, *shape, kind)
        tensors[f"blk.{layer}.{name}.weight"] = data, kind
        numbers[f"model.layers.{layer}.{ours}.weight"] = kind.name, gguf.quants.dequantize(data, kind)
    for name, (data, kind) in tensors.items():
        if name not in left_out:
            writer.add_tensor(name, data if changed is None else changed(name, data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def in_transformers_order(rows):
    """Rows of queries or keys, of which llama.cpp has the two halves of a head side by side."""
    return rows.reshape(HEADS, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def test_every_type_is_read_as_the_numbers_that_its_blocks_stand_for_and_saved_as_any_other(tmp_path):
    numbers = write(tmp_path / "model.gguf", TYPES)
    assert {kind for kind, _ in numbers.values()} == {*TYPES}
    check_readable(tmp_path / "model.gguf", "model.source")
    model = load_model(tmp_path, "model.gguf")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, (kind, values) in numbers.items():
        assert values.std() > 0, kind
        wanted = in_transformers_order(values) if name.split(".")[-2] in ("q_proj", "k_proj") else values
        assert np.array_equal(model.get_parameter(name).detach().numpy(), wanted), kind
    model.save_pretrained(tmp_path / "saved")
    assert "bitmill-" not in (tmp_path / "saved" / "config.json").read_text()
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


# With what transformers takes for granted of a file.
READ: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gpt2": {"n_inner": 256, "n_positions": 1024},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **OF_GEMMA},
    "gemma3_text": OF_GEMMA,
    "phi3": {"rope_parameters": {"rope_theta": 1e4}, "vocab_size": 32064},  # which its padding is in
}


SCALED = [
    ("llama", "linear", {}),
    ("llama", "yarn", {}),
    ("qwen3", "yarn", {"attention_factor": 1.7}),
    ("gemma3_text", "linear", {}),
]


@pytest.mark.parametrize(("name", "kind", "more"), [*((name, "", {}) for name in READ), *SCALED])
@torch.no_grad()
def test_a_file_that_we_write_is_read_as_the_same_model_and_tokenizer(name, kind, more, tmp_path, monkeypatch):
    """Nothing that lies beside it, or of its name in the working directory, is read instead."""
    fields = {"vocab_size": 300, **IN_LLAMA_CPP[name], **READ[name]}
    if kind:
        angles = {"rope_type": kind, "rope_theta": 100.0, **ANGLES[kind], **more}
        in_window = {"rope_type": "default", "rope_theta": 1e4}
        of_gemma = {"full_attention": angles, "sliding_attention": in_window}
        fields["rope_parameters"] = of_gemma if name == "gemma3_text" else angles
    folder = package(tmp_path / "package", {"architecture": name, **fields})
    words = train_bpe(["some words of a text, and some more words"], 300)
    words.save_pretrained(folder)
    signed(folder)
    exporter.write(folder, tmp_path, widened=True)
    for beside in ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / beside).write_text("{")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.gguf").write_bytes(b"another")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read_config(tmp_path, "model.gguf")
    assert (config.model_type, config.vocab_size) == ("llama" if name == "mistral" else name, fields["vocab_size"])
    assert kind in ("", *rope_types(config))
    assert check_gguf_file(skeleton(config), tmp_path / "model.gguf", "refuse") == ([], [])
    ids, (frozen, written, _) = torch.arange(5, 45)[None], read_package(folder)
    wanted = plain_model(frozen, written, families()[name].name)(ids).logits
    found = load_model(tmp_path, "model.gguf")(ids).logits
    assert wanted.std() > 0.2
    assert (found - wanted).abs().max() < 5e-3  # scales are fp16 there
    text = "some more words, and <|endoftext|> a text\n\nof 12 café"
    assert read_tokenizer(tmp_path, "model.gguf")(text).input_ids == words(text).input_ids


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"architecture": "starcoder2"},
            "architecture 'starcoder2', and GGUF files of that are not read; valid: gemma2, gemma3, gpt2, llama, ",
        ),
        ({"architecture": "qwen3moe"}, "architecture 'qwen3moe', and GGUF files of that are not read"),
        ({"architecture": "t5"}, "architecture 't5', and GGUF files of that are not read"),
        (
            {"settings": [("split.count", "uint16", 3)]},
            "is one of 3 parts of a model. Join them once: llama-gguf-split",
        ),
        ({"changed": lambda name, data: data.astype(np.float64) if "norm" in name else data}, "is of the type F64"),
    ],
)
def test_a_file_that_transformers_cannot_read_is_refused(tmp_path, written, message):
    write(tmp_path / "model.gguf", **written)
    with pytest.raises(ConfigError, match=f"model.source: .*{message}"):
        check_readable(tmp_path / "model.gguf", "model.source")


def test_rules_of_cutting_text_that_transformers_has_not_are_told(tmp_path):
    path, model = tmp_path / "model.gguf", ("tokenizer.ggml.model", "string", "gpt2")
    for rules, told in (("gpt-2", False), ("llama-bpe", False), ("smollm", True)):
        write(path, settings=[model, ("tokenizer.ggml.pre", "string", rules)])
        assert [f"by the rules {rules!r}, which transformers has not" in line for line in told_of_words(path)] == [
            True
        ] * told


@pytest.mark.parametrize("kept", [0, 3, 30, 400, 0.5, 0.999])
def test_a_file_that_is_not_whole_is_refused(tmp_path, kept):
    write(tmp_path / "model.gguf", ("Q4_0",))
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(ConfigError, match=r"MODEL: .*model.gguf is no GGUF file, or damaged or not whole"):
        check_readable(tmp_path / "model.gguf", "MODEL")


def test_another_file_and_a_type_that_is_not_known_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    content = path.read_bytes()
    path.write_bytes(b"PK\3\4" + content[4:])
    with pytest.raises(ConfigError, match="does not begin with GGUF"):
        check_readable(path, "model.source")
    place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # behind one dimension
    path.write_bytes(content[:place] + (42).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(ConfigError, match=r"uint32\(42\) is not a valid GGMLQuantizationType"):
        check_readable(path, "model.source")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_its_packages_a_file_is_refused(tmp_path, monkeypatch, package):
    monkeypatch.setattr("pipeline.models.gguf_file.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        ConfigError, match=rf"is read with {package}, not installed here.*pip install 'bitmill\[gguf\]'"
    ):
        check_readable(tmp_path / "model.gguf", "model.source")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"left_out": ["blk.0.ffn_up.weight"]},
            "lacks 1 tensors of a llama model .*: model.layers.0.mlp.up_proj.weight",
        ),
        (
            {"more": ["blk.0.attn_q.bias", "rope_freqs.weight"]},
            r"take 2 tensors of .*\(blk.0.attn_q.bias, rope_freqs.w",
        ),
        (
            {"changed": lambda name, data: data[:-1] if "gate" in name else data},
            "1 tensors of .* of another size than those of a llama model.*: blk.0.ffn_gate.weight",
        ),
        (
            {
                "settings": [
                    ("llama.rope.scaling.type", "string", "longrope"),
                    ("llama.rope.scaling.factor", "float32", 2.0),
                ]
            },
            "says that rope.scaling.type is longrope, and angles are read that are plain, linear or yarn alone",
        ),
        (
            {
                "settings": [
                    ("llama.rope.scaling.type", "string", "yarn"),
                    ("llama.rope.scaling.factor", "float32", 2.0),
                    ("llama.rope.scaling.yarn_beta_fast", "float32", 16.0),
                ]
            },
            "says that rope.scaling.type is yarn, and angles are read that are plain",
        ),
        ({"settings": [("llama.rope.scale_linear", "float32", 2.0)]}, "says that rope.scale_linear is 2.0, and angles"),
        ({"settings": [("llama.attention.sliding_window", "uint32", 8)]}, "says that attention.sliding_window is 8"),
        ({"settings": [("llama.attention.key_length", "uint32", 32)]}, "says that attention.key_length is 32"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path, written, message):
    write(tmp_path / "model.gguf", **written)
    model = skeleton(read_config(tmp_path, "model.gguf"))
    with pytest.raises(ConfigError, match=message):
        check_fits(model, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "kind", "value", "change", "message"),
    [
        (
            "rope.freq_base",
            "float32",
            5e5,
            lambda config: config.rope_parameters.update(rope_theta=1e4),
            "rope.freq_base is 500000.0, and transformers takes rope_theta 10000.0",
        ),
        (
            "rope.dimension_count",
            "uint32",
            HIDDEN // HEADS,
            lambda config: config.rope_parameters.update(partial_rotary_factor=0.5),
            "rope.dimension_count is 64, and transformers takes rotary size of a head 32",
        ),
        (
            "rope.freq_base",
            "float32",
            5e5,
            lambda config: setattr(config, "rms_norm_eps", 1e-6),
            "attention.layer_norm_rms_epsilon is 9.99.*e-06, and transformers takes rms_norm_eps 1e-06",
        ),
    ],
)
def test_angles_and_epsilons_are_compared_with_what_is_made_of_them(tmp_path, key, kind, value, change, message):
    path = tmp_path / "model.gguf"
    write(path, settings=[(f"llama.{key}", kind, value)])
    config = read_config(tmp_path, path.name)
    assert check_fits(skeleton(config), path) == ([], [])
    change(config)
    with pytest.raises(ConfigError, match=message):
        check_fits(skeleton(config), path)


def test_a_phi3_that_turns_a_part_of_its_heads_is_refused(tmp_path):
    path, padding = tmp_path / "model.gguf", ("tokenizer.ggml.padding_token_id", "uint32", 0)
    write(path, architecture="phi3", settings=[padding, ("phi3.rope.dimension_count", "uint32", 32)])
    with pytest.raises(
        ConfigError, match=r"rope.dimension_count is 32, and transformers takes rotary size of a head 64"
    ):
        check_fits(skeleton(read_config(tmp_path, path.name)), path)


def a_text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def crafted(*settings, tensors=(), declared=None):
    """A header of settings, each a key, the number of its kind, and its bytes."""
    entries = [a_text(key) + struct.pack("<I", kind) + content for key, kind, content in settings]
    counts = struct.pack("<IQQ", 3, len(tensors) if declared is None else declared, len(entries))
    return b"GGUF" + counts + b"".join(entries) + b"".join(tensors) + bytes(64)


LLAMA = ("general.architecture", 8, a_text("llama"))
LAYERS = ("llama.block_count", 4, struct.pack("<I", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (crafted(LLAMA, ("llama.a", 9, struct.pack("<IQ", 0, 2**60))), "its arrays have 1152921504606846976 elements"),
        (crafted(LLAMA, ("llama.a", 9, struct.pack("<IQ", 9, 1) * 9000)), "it holds arrays of arrays"),
        (crafted(LLAMA, ("llama.a", 8, struct.pack("<Q", 2**60))), "declares 1152921504606846976 bytes where 64 are"),
        (crafted(LLAMA, declared=2**60), "it declares 1152921504606846976 tensors and 1 settings"),
        (crafted(("general.architecture", 8, a_text(b"\xff\xfe"))), "'utf-8' codec can't decode"),
        (crafted(LLAMA, LAYERS, ("split.count", 8, a_text("three"))), "is one of 'three' parts of a model"),
        (crafted(LLAMA, ("llama.block_count", 4, struct.pack("<I", 2**31))), "llama.block_count is 2147483648; valid"),
        (crafted(LLAMA, LAYERS, tensors=[a_text("t") + struct.pack("<IIQ", 0, 0, 0)]), "t has 0 dimensions"),
        (crafted(("general.architecture", 4, struct.pack("<I", 7))), "of the architecture 7, and GGUF files"),
    ],
)
def test_a_header_made_to_do_harm_is_refused_in_one_sentence(tiny_config, tmp_path, content, message):
    (path := tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=f"model.source: {path} .*{message}"):
        plan_run(tiny_config(tmp_path, model={"source": str(path), "tokenizer": None}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("llama.attention.sliding_window", "array", [7, 7]), r"says that attention.sliding_window is \[7, 7\]"),
        (("general.name", "string", "mistral"), "damaged or not whole: Unknown gguf model_type: mistral"),
    ],
)
def test_a_setting_of_another_kind_than_it_should_be_is_refused(tmp_path, setting, message):
    write(tmp_path / "model.gguf", settings=[setting])
    with pytest.raises(ConfigError, match=message):
        check_fits(skeleton(read_config(tmp_path, "model.gguf")), tmp_path / "model.gguf")


def test_a_header_is_read_once_for_as_long_as_the_file_stays_as_it_is(tmp_path, monkeypatch):
    """By us once, and once more by transformers for the configuration."""
    write(path := tmp_path / "model.gguf")
    opened, init = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *all_: (opened.append(1), init(self, *all_))[1])

    def plan():
        check_readable(path, "model.source")
        for _ in range(2):
            assert check_fits(skeleton(read_config(tmp_path, path.name)), path) == ([], [])
        return read_config(tmp_path, path.name)

    plan().vocab_size = 1
    first = len(opened)
    assert plan().vocab_size == VOCABULARY
    assert len(opened) == first <= 3
    write(path, more=["rope_freqs.weight"])
    with pytest.raises(ConfigError, match="does not take 1 tensors"):
        plan()


def test_a_gemma_whose_scores_transformers_would_scale_otherwise_is_refused(tmp_path):
    """A file does not say by what: llama.cpp knows it of each size."""
    folder = package(
        tmp_path / "package", {"architecture": "gemma3_text", "vocab_size": 300, **IN_LLAMA_CPP["gemma3_text"]}
    )
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    exporter.write(folder, tmp_path, widened=True)
    with pytest.raises(
        ConfigError, match=r"llama.cpp computes scores times 0\.176777, not 0\.0625: transformers reads"
    ):
        check_gguf_file(skeleton(read_config(tmp_path, "model.gguf")), tmp_path / "model.gguf", "refuse")


def test_a_file_goes_through_the_straight_line_and_is_known_by_its_content(corpus, tiny_config, run_flow, tmp_path):
    """With the tokenizer that it holds, wherever it lies and whatever it is called."""
    folder = package(tmp_path / "package", {"architecture": "llama", "vocab_size": 300, **LLAMA_LIKE}, bits="8-8-8")
    train_bpe([corpus.read_text()], 300).save_pretrained(folder)
    signed(folder)
    exporter.write(folder, tmp_path)
    steps = {"steps": 3, "batch_size": 4, "eval_every": 3}
    config = tiny_config(
        tmp_path, model={"source": str(tmp_path / "model.gguf"), "tokenizer": None}, finetune=None, distill=steps
    )
    ran = run_flow(config, until="pack")
    assert (ran.record("finetune").family, ran.record("tokenize").vocabulary) == ("llama", 300)
    teacher, (frozen, _, _) = load_model(ran.folder("finetune") / "model"), read_package(folder)
    for name in frozen.codes:
        torch.testing.assert_close(teacher.get_submodule(name).weight.data, frozen.weight(name), rtol=2e-3, atol=1e-6)
    learned = read_tokenizer(ran.folder("tokenize") / "tokenizer")
    text = corpus.read_text()[:2000]
    assert learned(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert 1 < ran.record("evaluate").student["perplexity"] < 2000
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "model.gguf").rename(tmp_path / "elsewhere" / "another.gguf")
    again = run_flow(
        tiny_config(tmp_path, model={"source": str(moved), "tokenizer": None}, finetune=None, distill=steps),
        until="pack",
    )
    assert not [stage for event, stage in again.listener.events if event == "started"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", None, "model.source: .*model.gguf is not there"),
        ("model.gguf", b"GGUF", "model.source: .*damaged or not whole"),
        ("model.bin", b"GGUF", "model.source: .*model.bin is a file, and no GGUF file by its name"),
    ],
)
def test_the_plan_refuses_a_file_in_one_sentence(tiny_config, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        plan_run(tiny_config(tmp_path, model={"source": str(tmp_path / name), "tokenizer": None}))


def test_what_is_left_out_is_told(tmp_path):
    path = tmp_path / "model.gguf"
    scaling, window = ("llama.rope.scaling.type", "string", "none"), ("llama.attention.sliding_window", "uint32", 16)
    lengths = [(f"llama.attention.{part}_length", "uint32", HIDDEN // HEADS) for part in ("key", "value")]
    write(path, settings=[scaling, window, *lengths, ("llama.pooling", "bool", True)], more=["rope_freqs.weight"])
    notes, dropped = check_fits(skeleton(read_config(tmp_path, path.name)), path, drop=True)
    assert notes == [f"transformers leaves out of {path}: pooling True."]
    assert dropped == ["rope_freqs.weight"]


def test_inspect_says_of_tensors_left_out_what_it_says_of_a_folders(tiny_config, tmp_path):
    """Nobody set model.unused_tensors there."""
    write(tmp_path / "model.gguf", more=["rope_freqs.weight"])
    told = inspect_model(str(tmp_path / "model.gguf"), "auto", tiny_config(tmp_path).resources).unusual
    assert told[0] == (
        "1 tensors are not of the model that its settings describe: rope_freqs.weight. `compress` refuses it without "
        "model.unused_tensors: drop."
    )


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_numbers_that_are_none_are_refused_before_anything_starts(tiny_config, tmp_path, monkeypatch, kind):
    def broken(name, data):
        if "ffn_up" in name:  # of blocks the first scale, which 32 codes have
            data[5, :2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8) if kind == "Q8_0" else np.float32("nan")
        return data

    path, looked = tmp_path / "model.gguf", []
    write(path, (kind,), changed=broken)
    monkeypatch.setattr(numbers_in, "BLOCK", 3 * HIDDEN)
    monkeypatch.setattr(numbers_in, "_in_gguf", lambda path, own=numbers_in._in_gguf: looked.append(path) or own(path))
    train_bpe(["a text"], VOCABULARY + 256).save_pretrained(tmp_path / "words")
    config = tiny_config(tmp_path, model={"source": str(path), "tokenizer": str(tmp_path / "words")})
    run, named = pin(config), r"1 tensors in .* hold NaN .*: blk\.0\.ffn_up\.weight \((\d+) NaN, (\d+) infinite\)"
    for _ in range(2):
        with pytest.raises(ConfigError, match=named) as refused:
            check_checkpoint(run, skeleton(run.settings))
    counts = re.search(named, str(refused.value)).groups()
    assert sum(map(int, counts)) == (32 if kind == "Q8_0" else 2)
    assert len(looked) == 1
    told = inspect_model(str(path), "auto", config.resources).unusual
    assert any(line.startswith("blk.0.ffn_up.weight holds") for line in told)
