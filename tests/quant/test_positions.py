"""Position embeddings that ship shorter than they train: the nearest levels of the student's own grid."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config.quant import Quant
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student, restore_frozen
from pipeline.store.keys import recipe_of
from tests.conftest import ARCHITECTURES

WPE = "transformer.wpe"


def student(quantizer="lsq_symmetric"):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_layer=1, n_embd=16, n_head=2, n_positions=12)
    model = GPT2LMHeadModel(config)
    quant = Quant(quantizer=quantizer)
    with torch.no_grad():
        model.transformer.wpe.weight[0] = 0.0  # a row of zeros must stay one
        model.transformer.wpe.weight[1] *= 1000
    latent = model.transformer.wpe.weight.detach().clone()
    make_student(model, quant.spec(), family_named("gpt2"))
    return model, quant, latent, config


@pytest.mark.parametrize(("quantizer", "levels"), [("lsq_symmetric", 127.0), ("lsq", 127.0), ("seq", 127.5)])
@pytest.mark.parametrize(("scale_dtype", "slack"), [("float32", 1e-6), ("float16", 2**-11)])
def test_eight_bits_are_the_nearest_levels_with_one_scale_a_row(quantizer, levels, scale_dtype, slack):
    model, quant, latent, _ = student(quantizer)
    quant = quant.model_copy(update={"positions": "int8", "scale_dtype": scale_dtype})
    frozen = freeze_student(model, quant, family_named("gpt2"))
    assert f"{WPE}.weight" not in frozen.rest
    assert (frozen.bits[WPE], tuple(frozen.scales[WPE].shape)) == (8, (12, 1))
    assert frozen.scales[WPE].dtype == getattr(torch, scale_dtype)
    exact = latent.double().abs().amax(1, keepdim=True) / levels
    found = frozen.weight(WPE).double()
    assert ((found - latent).abs() <= exact * (0.5 + 128 * slack)).all()
    assert torch.equal(found[0], torch.zeros(16, dtype=torch.float64))
    assert 0.9 < found[1].abs().max() / latent[1].abs().max() < 1.1


@pytest.mark.parametrize(
    ("ships", "positions", "norms"),
    [
        ({}, torch.float32, torch.float32),
        ({"rest_dtype": "float16"}, torch.float16, torch.float16),
        ({"rest_dtype": "bfloat16", "positions": "fp32"}, torch.float32, torch.bfloat16),
        ({"positions": "fp16"}, torch.float16, torch.float32),
    ],
)
def test_unless_said_otherwise_positions_ship_as_all_other_tensors(ships, positions, norms):
    model, quant, latent, _ = student()
    frozen = freeze_student(model, quant.model_copy(update=ships), family_named("gpt2"))
    assert frozen.rest[f"{WPE}.weight"].dtype == positions
    assert frozen.rest["transformer.ln_f.weight"].dtype == norms
    assert torch.equal(frozen.rest[f"{WPE}.weight"], latent.to(positions))


@torch.no_grad()
def test_what_is_scored_is_what_ships():
    model, quant, _, config = student()
    quant = quant.model_copy(update={"positions": "int8"})
    frozen = freeze_student(model, quant, family_named("gpt2"))
    restored = restore_frozen(config, quant.spec(), family_named("gpt2"), frozen)
    model.transformer.wpe.weight.copy_(frozen.weight(WPE))
    ids = torch.arange(12)[None]
    assert torch.equal(restored(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(("architecture", "tables"), [("llama", 0), ("bart", 2)])
def test_families_have_none_or_two_tables_of_positions(architecture, tables):
    quant = Quant(positions="int8")
    model = build(read_config(ARCHITECTURES[architecture], vocab_size=60), seed=0)
    make_student(model, quant.spec(), family_named(architecture))
    frozen = freeze_student(model, quant, family_named(architecture))
    assert sum("position" in name for name in frozen.codes) == tables
    assert not any("position" in name for name in frozen.rest)


def test_how_positions_ship_is_part_of_the_recipe():
    assert recipe_of(Quant())["positions"] is None
    assert recipe_of(Quant(positions="int8"))["positions"] == "int8"
