"""Every family in ONNX Runtime against the model that transformers computes from the same package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError
from pipeline.export import gguf
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.hidden_states import last_states
from pipeline.models.student import make_student
from pipeline.runtime import Runtime
from pipeline.runtime.build import check, longest
from tests.family_models import ANGLES, DECODERS, ENCODER_DECODERS, LLAMA_LIKE, T5_1_1
from tests.packages import package, packed_logits

IDS = np.random.default_rng(0).integers(3, 300, 24).tolist()
IN_GGUF = ("dynamic", "linear", "llama3", "yarn")  # of Llama


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_a_family_are_those_of_the_packed_model(name, tmp_path):
    """With fp32 activations on both sides, of a whole text and of one that is generated token by token."""
    folder = package(tmp_path / "package", {"architecture": name, "vocab_size": 300, **DECODERS[name]})
    runtime = Runtime(folder, activations=32)
    found, wanted = runtime.logits(IDS), packed_logits(folder, IDS, activations=32)
    assert wanted.std() > 0.1
    assert np.abs(found - wanted).max() < 1e-4
    tokens = list(runtime.generate(IDS, 4, stop=()))
    assert tokens == runtime.logits(IDS + tokens)[len(IDS) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "fields", "quant"),
    [*((name, fields, {}) for name, fields in ENCODER_DECODERS.items()), ("t5", T5_1_1, {"positions": "int8"})],
)
def test_logits_of_a_family_with_an_encoder_are_those_of_the_packed_model(name, fields, quant, tmp_path):
    special = {"architecture": name, "vocab_size": 300, "pad_token_id": 1, "decoder_start_token_id": 2}
    folder = package(tmp_path / "package", {**fields, **special}, **quant)
    runtime, source = Runtime(folder, activations=32), IDS[::-1]
    found, wanted = runtime.logits(IDS, source), packed_logits(folder, IDS, source, activations=32)
    assert wanted.std() > 0.05
    assert np.abs(found - wanted).max() < 1e-4
    tokens = list(runtime.generate(source, 4, stop=()))
    assert tokens == runtime.logits([2, *tokens], source)[:-1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_rotary_angles_of_every_kind_are_those_of_the_model(kind, tmp_path):
    """Of a student that trains and texts as long as the runtime takes."""
    angles = {"rope_type": kind, "rope_theta": 100.0, **ANGLES[kind]}
    source = {"architecture": "llama", "vocab_size": 300, **LLAMA_LIKE, "rope_parameters": angles}
    student = build(read_config(source), seed=0)
    make_student(student, Quant(bits="2-2-8").spec(), family_named("llama"))
    last_states(student, torch.tensor([IDS])).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.any() for n, p in student.named_parameters() if "q_proj.w" in n)
    folder = package(tmp_path / "package", source)
    plain = package(tmp_path / "plain", {**source, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})
    config = read_config(folder)
    assert longest(config) == (32 if kind == "longrope" else 64)
    ids = np.random.default_rng(1).integers(3, 300, longest(config)).tolist()
    wanted = packed_logits(folder, ids, activations=32)
    assert np.abs(Runtime(folder, activations=32).logits(ids) - wanted).max() < 1e-4
    assert (np.abs(packed_logits(plain, ids, activations=32) - wanted).max() > 1e-3) == (kind != "dynamic")
    if kind not in IN_GGUF:
        with pytest.raises(ConfigError, match=f"not '{kind}'.* Valid for it: compressed-tensors, onnx, transf"):
            gguf.check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architecture": "stablelm", **LLAMA_LIKE},
            "a stablelm model has no graph in ONNX Runtime; valid: bart, .* It runs in torch",
        ),
        (
            {"architecture": "opt", **DECODERS["opt"], "word_embed_proj_dim": 32},
            "opt with word_embed_proj_dim of another width than hidden_size has no graph",
        ),
        (
            {"architecture": "opt", **DECODERS["opt"], "do_layer_norm_before": False},
            "opt with norms of another kind has no graph .* It runs in torch",
        ),
        (
            {"architecture": "gpt2", **DECODERS["gpt2"], "scale_attn_by_inverse_layer_idx": True},
            r"gpt2 with another attention scale than 1/sqrt\(head size\)",
        ),
    ],
    ids=lambda value: value["architecture"] if isinstance(value, dict) else "",
)
def test_what_has_no_graph_is_refused_with_what_works_instead(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(read_config({"vocab_size": 300, **fields}))
