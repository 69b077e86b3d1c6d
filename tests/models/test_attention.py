import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from pipeline.models.attention import use_quantized_attention
from pipeline.models.build import build, read_config
from pipeline.models.family import family_for
from pipeline.models.student import make_student
from pipeline.quant.spec import BitWidths, QuantSpec

ARCHITECTURES = {
    "gpt2": {"architecture": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "llama": {
        "architecture": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
}
each_model = pytest.mark.parametrize("name", ARCHITECTURES)
each_attention = pytest.mark.parametrize("attention", ["none", "qkv", "qkv_probabilities"])
IDS = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(5))


def model_of(name):
    model = build(read_config(ARCHITECTURES[name], vocab_size=64), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def student_of(name, attention, bits="4-4-8", **options):
    model = model_of(name)
    make_student(
        model, QuantSpec(BitWidths.parse(bits), attention=attention, **options), family_for(model.config.model_type)
    )
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_same_but_for_ties(found, expected):
    """Equal for most tokens: where float order tips a value over a rounding border, a token may differ."""
    error = (found - expected).abs().amax(-1).flatten()
    assert error.median() < 1e-5 * expected.abs().max()


def symmetric(x, over):
    highest = np.abs(x).max(-1, keepdims=True) if over == "token" else np.abs(x).max()
    return np.round(x / highest * 127) / 127 * highest


def from_zero(x, over):
    step = (x.max(-1, keepdims=True) if over == "token" else x.max()) / 255
    return np.round(x / step) * step


def reference(query, key, value, mask, attention, over="token"):
    """Attention by its formula in fp64: (batch, heads, length, head_dim), each key head serving a group of queries."""
    query, key, value = (symmetric(x.double().numpy(), over) for x in (query, key, value))
    out = np.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    weights = np.empty((*query.shape[:3], key.shape[2]))
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        scores = np.where(mask, scores, -np.inf)
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        weights[:, head] = exponents / exponents.sum(-1, keepdims=True)
    if attention == "qkv_probabilities":
        weights = from_zero(weights, over)
    for head in range(query.shape[1]):
        out[:, head] = weights[:, head] @ value[:, head // groups]
    return out.swapaxes(1, 2)


@pytest.mark.parametrize("attention", ["qkv", "qkv_probabilities"])
@pytest.mark.parametrize("over", ["token", "tensor"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_quantized_attention_follows_its_formula(attention, over, key_heads):
    model = model_of("llama")
    use_quantized_attention(model, QuantSpec(BitWidths.parse("4-4-8"), attention=attention, activation_range=over))
    forward = AttentionInterface()[model.config._attn_implementation]
    draw = torch.Generator().manual_seed(key_heads)
    query = torch.randn(2, 4, 7, 8, generator=draw)
    key, value = torch.randn(2, 2, key_heads, 7, 8, generator=draw)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~visible, torch.finfo(torch.float32).min)
    module = model.model.layers[0].self_attn
    found, _ = forward(module, query, key, value, mask, scaling=8**-0.5)
    expected = reference(query, key, value, visible.numpy(), attention, over)
    error = np.abs(found.numpy() - expected)
    assert np.mean(error > 2e-6) < 0.05  # float order may tip a probability over a rounding border
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    assert 1e-4 < np.abs(found.numpy() - plain.transpose(1, 2).numpy()).max() < 0.1


@each_model
@each_attention
def test_at_32_bits_nothing_changes(name, attention):
    eager = model_of(name)
    eager.set_attn_implementation("eager")
    student = student_of(name, attention, "32-32-32")
    torch.testing.assert_close(logits_of(student, IDS), logits_of(eager, IDS), rtol=1e-5, atol=1e-6)


@each_model
def test_each_attention_quantizes_more_than_the_one_before(name):
    kinds = ["none", "qkv", "qkv_probabilities"]
    none, qkv, all_ = (logits_of(student_of(name, attention), IDS) for attention in kinds)
    scale = none.abs().max()
    for one, other in ((none, qkv), (qkv, all_)):
        assert 0 < (one - other).abs().max() < 0.2 * scale


@each_model
@each_attention
def test_a_row_does_not_see_the_other_rows(name, attention):
    student = student_of(name, attention)
    together = logits_of(student, IDS)
    for row in range(len(IDS)):
        assert_same_but_for_ties(logits_of(student, IDS[row : row + 1]), together[row : row + 1])


@each_model
@each_attention
def test_a_token_does_not_see_later_ones(name, attention):
    student = student_of(name, attention)
    later = IDS.clone()
    later[:, 7:] = (later[:, 7:] + 13) % 64
    torch.testing.assert_close(logits_of(student, later)[:, :7], logits_of(student, IDS)[:, :7])


@each_model
@each_attention
def test_a_token_does_not_see_how_many_later_ones_there_are(name, attention):
    student = student_of(name, attention)
    whole = logits_of(student, IDS)
    for length in (4, 7):
        assert_same_but_for_ties(logits_of(student, IDS[:, :length])[:, -1], whole[:, length - 1])


@each_model
@each_attention
def test_decoding_with_a_cache_computes_what_was_trained(name, attention):
    student = student_of(name, attention)
    past, steps = None, []
    with torch.no_grad():
        for token in IDS.split(1, dim=1):
            out = student(token, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    assert_same_but_for_ties(torch.cat(steps, 1), logits_of(student, IDS))


def test_a_range_over_the_tensor_sees_the_batch():
    # The ablation whose evaluation batch belongs to the recipe: this is why the default is one range a token.
    student = student_of("gpt2", "qkv", activation_range="tensor")
    assert (logits_of(student, IDS[:1]) - logits_of(student, IDS)[:1]).abs().max() > 1e-4


@each_model
def test_gradients_pass_through_the_quantized_attention(name):
    student = student_of(name, "qkv_probabilities")
    student(IDS).logits.square().mean().backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), parameter_name
