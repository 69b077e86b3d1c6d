"""Every family in torch: its targets, its states and its head, and attention with quantized operands."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.quant import Quant
from pipeline.models.build import build, read_config, skeleton
from pipeline.models.family import families, family_for
from pipeline.models.hidden_states import head_of, last_states
from pipeline.models.student import make_student, quant_targets
from tests.family_models import DECODERS, ENCODER_DECODERS

SOURCES = {**DECODERS, **ENCODER_DECODERS}
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
SPECIAL = {"pad_token_id": 1, "decoder_start_token_id": 2}


def config_of(name):
    special = SPECIAL if families()[name].encoder_decoder else {}
    return read_config({"architecture": name, **SOURCES[name], **special}, vocab_size=300)


def random(name):
    """A model of large random weights, which no cap, factor or norm leaves as they are."""
    model = build(config_of(name), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model.eval()


def given(model):
    return (IDS, IDS[:, 3:], torch.ones_like(IDS[:, 3:])) if model.config.is_encoder_decoder else (IDS,)


def own_logits(model):
    ids, *source = given(model)
    return model(source[0], decoder_input_ids=ids).logits if source else model(ids).logits


def test_every_family_has_a_model_here():
    assert SOURCES.keys() == families().keys()


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_states_and_head_give_the_models_own_logits(name):
    model = random(name)
    torch.testing.assert_close(head_of(model)(last_states(model, *given(model))), own_logits(model))


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_every_matrix_is_quantized_or_named_as_one_that_is_not(name):
    config, family = config_of(name), family_for(name)
    assert family.name == name
    quantized = {f"{target.name}.weight" for target in quant_targets(skeleton(config), family)}
    matrices = {key for key, parameter in skeleton(config).named_parameters() if parameter.ndim > 1}
    assert matrices - quantized <= {f"{module}.weight" for module in family.unquantized}


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_attention_with_operands_of_eight_bits_is_near_the_models_own(name):
    plain, rounded = random(name), random(name)
    for model, attention in ((plain, "none"), (rounded, "qkv")):
        make_student(model, Quant(bits="32-32-8", attention=attention).spec(), family_for(name))
    wanted = own_logits(plain)
    assert 0 < (own_logits(rounded) - wanted).square().mean().sqrt() < 0.1 * wanted.std()
