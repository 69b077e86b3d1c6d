"""Every family in torch: its targets, its states and its head, and attention with quantized operands."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.data import TaskSettings
from pipeline.config.quant import Quant
from pipeline.models.blocks import numbers_of, numbers_of_side
from pipeline.models.build import build, read_config, skeleton
from pipeline.models.family import families, family_for
from pipeline.models.hidden_states import WithStates, head_of, last_states, logits_of
from pipeline.models.student import make_student, quant_targets
from pipeline.tasks.chat import BEGINS, LEARNED, Chat
from pipeline.tasks.scoring import token_nats
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
def test_keys_of_other_families_in_a_config_json_change_nothing(name):
    """Of which transformers takes what the model's own class names, and keeps the others."""

    def computed():
        family = families()[name]
        return numbers_of(config, family.blocks) if family.blocks else numbers_of_side(config, family.sides, "encoder")

    config = config_of(name)
    before, own = computed(), config.to_dict().keys() | config.attribute_map
    others = dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), 0.5)
    others |= dict.fromkeys(("hidden_activation", "hidden_act", "activation_function", "dense_act_fn"), "tanh")
    others |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 7)
    for key in others.keys() - own:
        setattr(config, key, others[key])
    assert computed() == before


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


LENGTHS = (12, 1, 20, 5)  # of the conversations of a row, some longer than a window


def packed_row(ids):
    """The batch of one row with conversations of LENGTHS, of whose tokens all are learned, and padding."""
    width = ids.shape[1]
    beside = torch.full_like(ids, LEARNED)
    beside[:, torch.tensor(LENGTHS).cumsum(0)[:-1]] = BEGINS
    lengths = torch.tensor([[sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)]])
    beside[:, sum(LENGTHS) :] = 0
    return Chat(TaskSettings(name="chat", block_length=width), packed=True).batch(torch.cat([ids, beside], 1), lengths)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_conversations_of_one_row_are_to_the_model_what_each_is_alone(name):
    model, ids = random(name), torch.randint(3, 300, (1, 42), generator=torch.Generator().manual_seed(2))
    batch, start = packed_row(ids), 0
    states, _ = WithStates(model)(*batch.inputs)  # which attends without masks where it may
    logits = logits_of(model, states)
    (nats,) = token_nats(logits, None, batch.targets)
    for length in LENGTHS:
        here = slice(start, start + length)
        alone = logits_of(model, last_states(model, ids[:, here]))
        torch.testing.assert_close(logits[:, here], alone, rtol=1e-5, atol=1e-5 * float(alone.std()))
        (lonely,) = token_nats(alone, None, ids[:, here][:, 1:])
        torch.testing.assert_close(nats[:, here][:, :-1], lonely[:, :-1], rtol=1e-5, atol=1e-5)
        assert batch.supervised[0, start : start + length - 1].all()
        assert start == 0 or not batch.supervised[0, start - 1], "nobody tells a conversation's first token"
        start += length


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_attention_with_quantized_operands_keeps_conversations_of_one_row_apart(name):
    model, ids = random(name), torch.randint(3, 300, (1, 42), generator=torch.Generator().manual_seed(2))
    make_student(model, Quant(bits="32-32-8", attention="qkv_probabilities").spec(), family_for(name))
    before = last_states(model, *packed_row(ids).inputs)
    ids[:, LENGTHS[0] :] = IDS[:1, :1]
    after = last_states(model, *packed_row(ids).inputs)
    assert torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
    ids[:, : LENGTHS[0] + 1] = IDS[:1, 1:2]
    then = last_states(model, *packed_row(ids).inputs)
    assert torch.equal(then[:, sum(LENGTHS[:2]) : sum(LENGTHS)], after[:, sum(LENGTHS[:2]) : sum(LENGTHS)])
