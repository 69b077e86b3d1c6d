"""Every family that llama.cpp and compressed-tensors have, there; and what of a family they would compute otherwise."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.export import compressed_tensors, gguf
from pipeline.models.build import read_config
from pipeline.models.family import families
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ROOT
from tests.family_models import ANGLES, DECODERS, ENCODER_DECODERS, IN_LLAMA_CPP
from tests.packages import package, packed_logits, signed

IDS = np.random.default_rng(0).integers(3, 300, 20).tolist()


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_a_family_is_the_same_in_llama_cpp(name, tmp_path):
    """With the weights that the codes stand for in fp32, so that llama.cpp has nothing to round: its tables of
    activations have 16 bits."""
    folder = package(tmp_path / "package", {"architecture": name, "vocab_size": 300, **IN_LLAMA_CPP[name]})
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    gguf.write(folder, tmp_path, widened=True)
    logits = gguf.open_logits(tmp_path, 1)
    for ids in (IDS, IDS[::-1], IDS[1:]):  # one text after another, of which nothing is left
        wanted = torch.tensor(packed_logits(folder, ids, activations=32)).log_softmax(-1).numpy()
        assert wanted.std() > 0.2
        assert np.abs(wanted - logits(ids)).max() < 5e-3


ROTARY = sorted(IN_LLAMA_CPP.keys() - {"gpt2", "phi3", "gemma3_text"})  # transformers makes longrope of Phi's


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("llama", "dynamic", {}),
        ("llama", "llama3", {}),
        *((name, kind, {}) for name in ROTARY for kind in ("linear", "yarn")),
        ("gemma3_text", "linear", {}),
        ("qwen3", "yarn", {"attention_factor": 1.7}),
    ],
)
def test_rotary_angles_that_are_not_plain_are_the_same_in_llama_cpp(name, kind, fields, tmp_path):
    """Of Gemma 3 in the layers without a window, as those of its models that read long texts have them."""
    angles, plain = {"rope_type": kind, "rope_theta": 100.0, **ANGLES[kind], **fields}, {"rope_type": "default"}
    if name == "gemma3_text":
        angles, plain = (
            {"full_attention": of_all, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
            for of_all in (angles, {"rope_type": "default", "rope_theta": 100.0})
        )
    source = {"architecture": name, "vocab_size": 300, **IN_LLAMA_CPP[name], "rope_parameters": angles}
    folder = package(tmp_path / "package", source)
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    gguf.write(folder, tmp_path, widened=True)
    wanted = torch.tensor(packed_logits(folder, IDS, activations=32)).log_softmax(-1).numpy()
    assert np.abs(wanted - gguf.open_logits(tmp_path, 1)(IDS)).max() < 5e-3
    plain = {**source, "rope_parameters": {"rope_theta": 100.0, **plain}}
    other = torch.tensor(packed_logits(package(tmp_path / "plain", plain), IDS, activations=32)).log_softmax(-1)
    assert (np.abs(wanted - other.numpy()).max() > 0.05) == (kind != "dynamic")


def phi_of_long_texts(original=256):
    """With angles for texts of up to so many tokens, and others for longer ones."""
    angles = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 6.0, 3.0, 5.0],
        "original_max_position_embeddings": original,
    }
    more = {"max_position_embeddings": 1024, "original_max_position_embeddings": original, "rope_parameters": angles}
    return {"architecture": "phi3", "vocab_size": 300, **IN_LLAMA_CPP["phi3"], **more}


@pytest.mark.parametrize("long", [False, True])
def test_longrope_of_phi_3_is_the_same_in_llama_cpp(long, tmp_path, monkeypatch):
    """In contexts of short texts, which the file says; those of long ones take the other angles, and transformers
    takes these for longer texts alone."""
    folder = package(tmp_path / "package", phi_of_long_texts())
    train_bpe(["some words of a text"], 300).save_pretrained(folder)
    signed(folder)
    if long:
        monkeypatch.setattr(gguf, "_longest", lambda config: config.max_position_embeddings)
    notes = gguf.write(folder, tmp_path, widened=True)
    assert [note.startswith("texts of up to 256 tokens, of the model's 1024") for note in notes] == [True] * (not long)
    ids = np.random.default_rng(0).integers(3, 300, 270 if long else 250).tolist()
    logits = [packed_logits(folder, some, activations=32) for some in (ids, ids[:250])]
    wanted, of_short = (torch.tensor(given).log_softmax(-1).numpy() for given in logits)
    assert (np.abs(wanted[:250] - of_short).max() > 0.05) == long
    assert np.abs(wanted - gguf.open_logits(tmp_path, 1)(ids)).max() < 5e-3


def test_longrope_that_changes_within_a_context_of_llama_cpp_is_refused():
    with pytest.raises(ConfigError, match="contexts of a multiple of 256 tokens, of which 300 is none"):
        gguf.check(read_config(phi_of_long_texts(300)))


@pytest.mark.parametrize("name", [name for name, family in families().items() if family.compressed_tensors])
def test_a_family_is_the_same_in_compressed_tensors(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    folder = package(tmp_path / "package", {"architecture": name, "vocab_size": 300, **DECODERS[name]})
    compressed_tensors.write(folder, out)
    assert compressed_tensors.read_back(folder, out)[0] < 2**-10
    wanted = packed_logits(folder, IDS, activations=32)
    assert np.abs(wanted - compressed_tensors.open_logits(out, 1)(IDS)).max() < 0.02


def test_the_document_says_of_each_family_what_takes_it():
    text = (ROOT / "pipeline" / "models" / "README.md").read_text(encoding="utf-8")
    said = {}
    for line in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE):
        names, *takes = line.split(" | ")
        said |= {name: tuple(cell.startswith("yes") for cell in takes) for name in re.findall(r"`(\w+)`", names)}
        assert all(cell.startswith(("yes", "no")) for cell in takes)
    supported = ("graph", "gguf", "compressed_tensors")
    assert said == {name: tuple(bool(getattr(of, kind)) for kind in supported) for name, of in families().items()}
    turned = {name: of.gguf for name, of in families().items() if of.gguf and of.blocks and not of.blocks.positions}
    scaled = {kind: {name for name, of in turned.items() if kind in of.scales_angles} for kind in ANGLES}
    assert scaled["linear"] == turned.keys() - {"phi3"}
    assert scaled["yarn"] == turned.keys() - {"phi3", "gemma3_text"}
    assert scaled["longrope"] == {"phi3"}
    assert {name for name, of in turned.items() if of.divides_angles} == {"llama", "mistral"}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mistral", DECODERS["mistral"], r"no window, not sliding_window 7"),
        ("qwen2", DECODERS["qwen2"], r"no window, not sliding_window 7"),
        ("phi3", DECODERS["phi3"], r"no window, not sliding_window 7"),
        ("gemma3_text", DECODERS["gemma3_text"], r"a window in all but every 6th layer, not sliding_window 7"),
        ("gemma2", DECODERS["gemma2"], r"scores times 0\.17\d+, not 0\.22\d+"),
        ("gemma2", {**IN_LLAMA_CPP["gemma2"], "final_logit_softcapping": None}, "capped scores and logits, unlike"),
        (
            "gemma3_text",
            {**IN_LLAMA_CPP["gemma3_text"], "final_logit_softcapping": 3.0},
            "no caps of scores and logits",
        ),
        ("smollm3", DECODERS["smollm3"], "no positions in every 4th layer"),
        (
            "qwen3",
            {**DECODERS["qwen3"], "attention_bias": True},
            "with attention_bias False, not True.* Valid for it: compressed-tensors, onnx, transformers",
        ),
        ("gpt_neox", {**DECODERS["gpt_neox"], "hidden_act": "relu"}, "gelu, not the activation 'relu'"),
        ("opt", DECODERS["opt"], "not opt: llama.cpp has no such architecture.* Valid for it: onnx, transformers"),
        ("t5", ENCODER_DECODERS["t5"], "not t5: .*none with an encoder. Valid for it: onnx, transformers"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        gguf.check(read_config({"architecture": name, "vocab_size": 300, **fields}))


def test_what_vllm_does_not_read_packed_is_refused():
    config = read_config({"architecture": "t5", "vocab_size": 300, **ENCODER_DECODERS["t5"]})
    with pytest.raises(ConfigError, match=r"not t5, whose layers vLLM does not read .* Valid for it: onnx"):
        compressed_tensors.check(config)


@pytest.mark.parametrize(
    ("in_window", "elsewhere", "message"),
    [
        ({"rope_theta": 5e3}, {}, "layers with a window with a rope_theta of 10000, not 5000"),
        ({"rope_type": "linear", "factor": 2.0}, {}, "layers with a window with plain rotary angles, not .* 'linear'"),
        (
            {},
            {"rope_type": "yarn", **ANGLES["yarn"]},
            "rope_type default, dynamic, linear, not 'yarn'.* Valid for it",
        ),
    ],
)
def test_angles_of_gemma_3_other_than_llama_cpps_are_refused(in_window, elsewhere, message):
    angles = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, **in_window},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6, **elsewhere},
    }
    fields = {**IN_LLAMA_CPP["gemma3_text"], "rope_parameters": angles}
    with pytest.raises(ConfigError, match=message):
        gguf.check(read_config({"architecture": "gemma3_text", "vocab_size": 300, **fields}))


@pytest.mark.parametrize(("setting", "value"), [("beta_fast", 16), ("beta_slow", 2), ("truncate", False)])
def test_settings_of_yarn_that_llama_cpp_does_not_read_are_refused(setting, value):
    angles = {"rope_type": "yarn", "rope_theta": 1e4, **ANGLES["yarn"], setting: value}
    with pytest.raises(ConfigError, match=f"yarn with {setting} .*, not {value}. Valid for it: compressed-tensors"):
        gguf.check(read_config({"architecture": "qwen3", **DECODERS["qwen3"], "rope_parameters": angles}))
