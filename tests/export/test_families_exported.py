"""Every family that llama.cpp and compressed-tensors have, there; and what of a family they would compute otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.export import compressed_tensors, gguf
from pipeline.models.build import read_config
from pipeline.models.family import families
from pipeline.tasks.tokenizers import train_bpe
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
    wanted = torch.tensor(packed_logits(folder, IDS, activations=32)).log_softmax(-1).numpy()
    assert wanted.std() > 0.2
    assert np.abs(wanted - gguf.open_logits(tmp_path, 1)(IDS)).max() < 5e-3


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


@pytest.mark.parametrize("name", [name for name, family in families().items() if family.compressed_tensors])
def test_a_family_is_the_same_in_compressed_tensors(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    folder = package(tmp_path / "package", {"architecture": name, "vocab_size": 300, **DECODERS[name]})
    compressed_tensors.write(folder, out)
    assert compressed_tensors.read_back(folder, out)[0] < 2**-10
    wanted = packed_logits(folder, IDS, activations=32)
    assert np.abs(wanted - compressed_tensors.open_logits(out, 1)(IDS)).max() < 0.02


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
