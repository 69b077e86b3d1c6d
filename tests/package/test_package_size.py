"""GPT-2 small and BART base, 124M and 139M parameters, pack to the sizes that the paper prints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from pipeline.config.quant import Quant
from pipeline.models.build import fp32_bytes, parameters
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student
from pipeline.package import manifest
from pipeline.package.codec import encode
from pipeline.package.package import load, read_package, write_package
from pipeline.package.safe_read import read_tensors
from tests.packages import NO_METRICS

MIB = 2**20
TEACHER_BYTES = 124_439_808 * 4
SHORT = {"scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"}
BASE = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}


@pytest.fixture(scope="module")
def gpt2_small():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    assert parameters(model) * 4 == TEACHER_BYTES
    return model


@pytest.fixture(scope="module")
def bart_base():
    torch.manual_seed(0)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BASE.items()}
    model = BartForConditionalGeneration(BartConfig(d_model=768, **sides))
    assert parameters(model) == 139_420_416
    assert round(fp32_bytes(model) / MIB, 1) == 532.0
    return model


def frozen_at(model, bits, family="gpt2", **settings):
    """gamma 1 everywhere: its search changes scales, not sizes."""
    quant = Quant(bits=bits, gamma_init="one", **settings)
    student = copy.deepcopy(model)
    make_student(student, quant.spec(), family_named(family))
    return freeze_student(student, quant, family_named(family)), quant


def size_of(folder, model, bits, encoding, family="gpt2", **settings):
    """What a package of it weighs; what is read back is what was written."""
    frozen, quant = frozen_at(model, bits, family, **settings)
    facts = {"name": family, "teacher_bytes": fp32_bytes(model), "lineage": {}, "metrics": NO_METRICS}
    size = write_package(folder, frozen, model.config, quant, encoding, family, facts)["size"]
    assert size["packed_bytes"] == (folder / manifest.WEIGHTS).stat().st_size
    assert read_package(folder)[0].digest() == frozen.digest()
    return size


def test_gpt2_at_two_bits_has_the_size_of_the_paper_and_about_that_on_disk(gpt2_small, tmp_path):
    """Dense, one scale a matrix, all else fp32."""
    size = size_of(tmp_path, gpt2_small, "2-2-8", "dense")
    assert 32.9 <= size["paper_bytes"] / MIB <= 33.1
    assert round(size["paper_ratio"], 1) == 14.4
    assert 33.0 * MIB < size["packed_bytes"] <= 33.3 * MIB


def test_the_smallest_gpt2_is_under_25_mib(gpt2_small, tmp_path):
    """With a scale for each row, as the preset has it: more bytes than one a matrix."""
    size = size_of(
        tmp_path, gpt2_small, "2-2-8", "base3", quantizer="lsq_symmetric", granularity="per_channel", **SHORT
    )
    assert size["packed_bytes"] <= 25.0 * MIB
    assert size["ratio"] >= 19.0
    assert round(size["paper_ratio"], 1) == 14.4  # which counts positions in fp32, however they ship


def test_bart_base_at_two_bits_has_the_size_of_the_paper_and_about_that_on_disk(bart_base, tmp_path):
    size = size_of(tmp_path, bart_base, "2-2-8", "dense", "bart")
    assert round(size["paper_bytes"] / MIB, 1) == 39.6
    assert round(size["paper_ratio"], 1) == 13.4
    assert 39.6 * MIB < size["packed_bytes"] < 39.8 * MIB  # without final_logits_bias, which is zero


def test_the_smallest_bart_base_is_under_29_and_a_half_mib(bart_base, tmp_path):
    size = size_of(
        tmp_path, bart_base, "2-2-8", "base3", "bart", quantizer="lsq_symmetric", granularity="per_channel", **SHORT
    )
    assert size["packed_bytes"] <= 29.5 * MIB
    assert size["ratio"] >= 18.0
    assert round(size["paper_ratio"], 1) == 13.4


def test_a_final_bias_is_stored_only_where_it_says_something(tmp_path):
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=60, max_position_embeddings=12)
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config)
    for name, value in (("zero", 0.0), ("other", 0.5)):
        model.final_logits_bias[0, 7] = value
        (tmp_path / name).mkdir()
        size_of(tmp_path / name, model, "2-2-8", "dense", "bart")
        stored = load_file(tmp_path / name / manifest.WEIGHTS)
        assert ("final_logits_bias" in stored) == (name == "other")
        assert torch.equal(read_package(tmp_path / name)[0].rest["final_logits_bias"], model.final_logits_bias)
        assert torch.equal(load(tmp_path / name).final_logits_bias, model.final_logits_bias)


def test_packed_bytes_are_mapped_not_copied(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_layer=1, n_embd=64, n_head=2))
    frozen, _ = frozen_at(model, "2-2-8")
    save_file(encode(frozen, "dense")[0], tmp_path / "weights")
    tensors = read_tensors(tmp_path / "weights")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [[int(end, 16) for end in m[0].split("-")] for m in maps if m[-1] == str(tmp_path / "weights")]
    assert places
    for tensor in tensors.values():
        assert any(first <= tensor.data_ptr() < last for first, last in places)
