"""GPT-2 small and BART base, 124M and 139M parameters, pack to the sizes that the paper prints."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from pipeline import artifact
from pipeline.config import Quant
from pipeline.families.models import FAMILIES, fp32_bytes, make_student, parameters
from pipeline.quant.layers import freeze

MIB = 2**20
TEACHER_BYTES = 124_439_808 * 4
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


def frozen_at(model, bits, family="gpt2"):
    """gamma 1 everywhere: its search changes scales, not sizes."""
    quant = Quant(bits=bits, gamma_init="one")
    student = copy.deepcopy(model)
    make_student(student, quant.spec(), FAMILIES[family])
    return freeze(student, quant.spec(), torch.float32, torch.float32), quant


@pytest.mark.parametrize(("bits", "mib", "ratio"), [("4-4-8", 62.4, 7.6), ("8-8-8", 121.3, 3.9)])
def test_wider_codes_give_the_sizes_of_the_paper(gpt2_small, bits, mib, ratio):
    size = artifact.sizes(frozen_at(gpt2_small, bits)[0], packed_bytes=1, teacher_bytes=TEACHER_BYTES)
    assert round(size.paper_bytes / MIB, 1) == mib
    assert round(size.paper_ratio, 1) == ratio


@pytest.mark.parametrize(("encoding", "most_mib"), [("dense", 34.0), ("base3", 28.0)])
def test_two_bits_give_the_size_of_the_paper_and_about_that_on_disk(gpt2_small, tmp_path, encoding, most_mib):
    frozen, quant = frozen_at(gpt2_small, "2-2-8")
    nothing = {"teacher": {}, "student": {}, "protocol": ""}
    facts = {"name": "gpt2", "teacher_bytes": TEACHER_BYTES, "lineage": {}, "metrics": nothing}
    manifest = artifact.write(tmp_path, frozen, gpt2_small.config, quant, encoding, "gpt2", facts)
    size = manifest["size"]
    assert 32.9 <= size["paper_bytes"] / MIB <= 33.1
    assert round(size["paper_ratio"], 1) == 14.4
    assert size["packed_bytes"] == (tmp_path / artifact.WEIGHTS).stat().st_size <= most_mib * MIB
    unpacked, _, _ = artifact.read(tmp_path)
    assert unpacked.digest() == frozen.digest()


@pytest.mark.parametrize(("bits", "mib", "ratio"), [("4-4-8", 72.4, 7.3), ("8-8-8", 138.1, 3.9)])
def test_bart_base_has_the_sizes_of_the_paper(bart_base, bits, mib, ratio):
    frozen, _ = frozen_at(bart_base, bits, "bart")
    size = artifact.sizes(frozen, packed_bytes=1, teacher_bytes=fp32_bytes(bart_base))
    assert round(size.paper_bytes / MIB, 1) == mib
    assert round(size.paper_ratio, 1) == ratio


def test_bart_base_at_two_bits_has_the_size_of_the_paper_and_about_that_on_disk(bart_base, tmp_path):
    frozen, quant = frozen_at(bart_base, "2-2-8", "bart")
    nothing = {"teacher": {}, "student": {}, "protocol": ""}
    facts = {"name": "bart", "teacher_bytes": fp32_bytes(bart_base), "lineage": {}, "metrics": nothing}
    size = artifact.write(tmp_path, frozen, bart_base.config, quant, "dense", "bart", facts)["size"]
    assert round(size["paper_bytes"] / MIB, 1) == 39.6
    assert round(size["paper_ratio"], 1) == 13.4
    assert 39.6 * MIB < size["packed_bytes"] < 40.1 * MIB
    assert artifact.read(tmp_path)[0].digest() == frozen.digest()
