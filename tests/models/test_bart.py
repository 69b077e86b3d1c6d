import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError
from pipeline.models.build import (
    build,
    fp32_bytes,
    load_model,
    parameters,
    read_config,
    set_dropout,
    skeleton,
)
from pipeline.models.family import family_named
from pipeline.models.hidden_states import WithStates, head_of, last_states
from pipeline.models.student import (
    freeze_student,
    load_frozen,
    load_parameters,
    make_student,
    quant_targets,
    restore_frozen,
    save_frozen,
)
from pipeline.quant.frozen import freeze
from pipeline.quant.modules import QuantizedEmbedding
from tests.conftest import ARCHITECTURES

BART = family_named("bart")
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
ATTENTION = [f"{x}_proj" for x in ("q", "k", "v", "out")]
GENERATOR = torch.Generator().manual_seed(3)
SOURCE = torch.randint(3, 64, (3, 12), generator=GENERATOR)
MASK = torch.arange(12) < torch.tensor([[12], [7], [4]])
IDS = torch.randint(3, 64, (3, 9), generator=GENERATOR)


def config_of(**changes):
    return read_config({**ARCHITECTURES["bart"], **changes}, vocab_size=64, **SPECIAL)


def built(seed=0, **changes):
    model = build(config_of(**changes), seed).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.final_logits_bias.copy_(torch.randn(1, 64, generator=generator))
    return model


def trained_student(folder, quant):
    """A student whose weights moved, the padding row excepted."""
    built().save_pretrained(folder)
    student = load_model(folder)
    make_student(student, quant.spec(), BART)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return student.eval()


def test_every_linear_of_both_sides_and_one_shared_table():
    found = quant_targets(skeleton(config_of()), BART)
    expected = {}
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        for layer in range(2):
            expected |= {f"model.{side}.layers.{layer}.{a}.{x}": True for a in attentions for x in ATTENTION}
            expected |= {f"model.{side}.layers.{layer}.fc1": True, f"model.{side}.layers.{layer}.fc2": False}
    assert {s.name: s.symmetric_input for s in found if s.role == "linear"} == expected
    assert [(s.name, s.role) for s in found if s.role != "linear"] == [
        ("model.shared", "embedding"),
        ("model.encoder.embed_tokens", "tied_embedding"),
        ("model.decoder.embed_tokens", "tied_embedding"),
        ("lm_head", "tied_head"),
    ]
    assert not any(target.transposed for target in found)


def test_separate_tables_are_refused():
    with pytest.raises(ConfigError, match="tie_word_embeddings is false"):
        quant_targets(skeleton(config_of(tie_word_embeddings=False)), BART)


def test_states_and_logits_are_the_models_own():
    model = built()
    with torch.no_grad():
        last, states = WithStates(model)(IDS, SOURCE, MASK.long())
        logits = head_of(model)(last)
        expected = model(SOURCE, attention_mask=MASK.long(), decoder_input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(states, expected.decoder_hidden_states[-1])


@pytest.mark.parametrize("attention", ["none", "qkv", "qkv_probabilities"])
def test_neither_source_padding_nor_later_tokens_show(attention):
    student = built()
    make_student(student, Quant(bits="2-2-8", attention=attention).spec(), BART)
    with torch.no_grad():
        states = last_states(student, IDS, SOURCE, MASK.long())
        other = SOURCE.where(MASK, torch.full_like(SOURCE, 17))
        assert torch.equal(last_states(student, IDS, other, MASK.long()), states)
        alone = last_states(student, IDS[2:, :5], SOURCE[2:, :4], MASK[2:, :4].long())
        unmasked = last_states(student, IDS, SOURCE, torch.ones_like(SOURCE))
    torch.testing.assert_close(alone, states[2:, :5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked[2], states[2], atol=1e-3)


def test_attention_operands_of_both_kinds_are_quantized():
    models = [built() for _ in range(2)]
    for model, attention in zip(models, ("none", "qkv"), strict=True):
        make_student(model, Quant(bits="32-32-8", attention=attention).spec(), BART)
    with torch.no_grad():
        plain, quantized = (last_states(model, IDS, SOURCE, MASK.long()) for model in models)
    assert 1e-5 < (plain - quantized).abs().max() < 0.5


def test_every_name_reads_the_one_table_at_its_scale():
    student = built()
    make_student(student, Quant(bits="2-2-8").spec(), BART)
    tables = [m for m in student.modules() if isinstance(m, QuantizedEmbedding)]
    assert len(tables) == 1
    assert [n for n, p in student.named_parameters() if p.shape[0] == 64] == [
        "model.shared.weight",
        "model.shared.quantizer.gamma",
    ]
    ids = torch.tensor([[5, 6]])
    looked_up = tables[0].on_grid()[ids] * 32**0.5  # scale_embedding
    for side in (student.model.encoder, student.model.decoder):
        assert torch.equal(side.embed_tokens(ids), looked_up)
    states = torch.randn(1, 2, 32, generator=GENERATOR)
    head = states @ tables[0].on_grid().double().float().T
    assert torch.corrcoef(torch.stack([student.lm_head(states).flatten(), head.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("bits", [None, "2-2-8", "8-8-8"])
def test_the_padding_row_stays_zero_while_all_others_move(bits):
    model = built()
    if bits:
        make_student(model, Quant(bits=bits, ste="identity").spec(), BART)
    wrapped = WithStates(model)
    weight = model.get_input_embeddings().weight
    assert not weight[1].any()
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        head_of(model)(wrapped(IDS, SOURCE, MASK.long())[0]).logsumexp(-1).sum().backward()
        optimizer.step()
    assert not weight[1].any()
    assert torch.isfinite(weight).all()
    moved = (weight != before).any(1)
    assert moved[torch.arange(64) != 1].all()


def test_dropout_of_every_kind_can_be_set():
    model = built(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2, encoder_layerdrop=0.9).train()
    set_dropout(model, 0.5)
    given = (IDS, SOURCE, MASK.long())
    assert not torch.equal(last_states(model, *given), last_states(model, *given))
    set_dropout(model, 0.0)
    assert torch.equal(last_states(model, *given), last_states(model, *given))
    assert torch.equal(last_states(model, *given), last_states(copy.deepcopy(model).eval(), *given))


def test_the_bias_of_the_logits_is_counted_and_saved(tmp_path):
    model = built()
    assert fp32_bytes(model) == 4 * (parameters(model) + 64)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).final_logits_bias, model.final_logits_bias)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("bits", ["2-2-8", "4-8-8"])
def test_the_frozen_student_is_the_trained_student(tmp_path, bits):
    quant = Quant(bits=bits, attention="qkv", overrides={r".*encoder_attn\..*": 8})
    student = trained_student(tmp_path, quant)
    save_frozen(freeze_student(student, quant, BART), tmp_path / "frozen.safetensors")
    frozen = load_frozen(tmp_path / "frozen.safetensors")
    assert frozen.digest() == freeze(student, quant.spec(), torch.float32, torch.float32).digest()
    save_file(dict(student.named_parameters()), tmp_path / "weights.safetensors")
    again = load_model(tmp_path)
    make_student(again, quant.spec(), BART)
    load_parameters(again, load_file(tmp_path / "weights.safetensors"))
    assert freeze_student(again, quant, BART).digest() == frozen.digest()
    assert {"final_logits_bias", "model.encoder.embed_positions.weight"} <= set(frozen.rest)
    assert not any("embed_tokens" in name or "lm_head" in name for name in {**frozen.rest, **frozen.codes})
    restored = restore_frozen(read_config(tmp_path), quant.spec(), BART, frozen)
    given = {"attention_mask": MASK.long(), "decoder_input_ids": IDS}
    with torch.no_grad():
        assert torch.equal(restored(SOURCE, **given).logits, student(SOURCE, **given).logits)
