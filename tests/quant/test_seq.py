import math

import numpy as np
import pytest
import torch

from tests.quant.cases import GRANULARITIES, clipping_steps, example, make, mean, passed, total

CASES = [(bits, granularity) for bits in (2, 4, 8) for granularity in GRANULARITIES]
each_case = pytest.mark.parametrize(("bits", "granularity"), CASES)


def reference(w, s, g, bits, granularity):
    """(clip(round(w / s - 0.5), -2^(b-1), 2^(b-1) - 1) + 0.5) s; straight through as far as a weight rounds to it."""
    half = 2 ** (bits - 1)
    level = np.clip(np.rint(w / s - 0.5), -half, half - 1) + 0.5
    inside = np.abs(w / s) < half
    slope = np.where(inside, level - w / s, level)
    weights = w.shape[1] if granularity == "per_channel" else w.size
    return level * s, np.where(inside, g, 0), total(g * slope, granularity) / np.sqrt(weights * (half - 1))


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_match_the_formulas(bits, granularity, dtype, tolerance):
    weight, upstream = example(dtype)
    quantizer = make("seq", weight, bits, granularity)
    quantizer.first.data = clipping_steps(weight, bits, granularity)
    quantized, dw = passed(quantizer, weight, upstream)
    given = (t.detach().double().numpy() for t in (weight, quantizer.first, upstream))
    expected = reference(*given, bits, granularity)
    assert 0 < (expected[1] == 0).sum() < weight.numel()
    for ours, theirs in zip((quantized, dw, (quantizer.gamma.grad / quantizer.first).numpy()), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_two_bits_have_four_levels_around_zero_and_none_at_zero():
    weight = torch.linspace(-4, 4, 33).unsqueeze(0)
    quantizer = make("seq", weight)
    quantizer.first.data = torch.ones(1, 1)
    assert quantizer(weight).unique().tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_the_gradient_reaches_half_a_step_beyond_the_outermost_levels():
    weight = torch.tensor([[-1.0, -0.875, 0.875, 1.0]], requires_grad=True)
    quantizer = make("seq", weight.detach())
    quantizer.first.data = torch.tensor([[0.5]])  # the outermost levels are -0.75 and 0.75
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert weight.grad.tolist() == [[0, 10, 100, 0]]
    slopes = 1 * -1.5 + 10 * (-1.5 + 1.75) + 100 * (1.5 - 1.75) + 1000 * 1.5
    assert quantizer.gamma.grad.item() == pytest.approx(0.5 * slopes / math.sqrt(4))  # the scale is gamma times 0.5


@each_case
def test_at_the_start_the_scale_times_its_levels_spans_all_weights(bits, granularity):
    weight, _ = example()
    magnitude = np.abs(weight.numpy())
    largest = magnitude.max(axis=1, keepdims=True) if granularity == "per_channel" else magnitude.max().reshape(1, 1)
    expected = largest / 2 ** (bits - 1)
    np.testing.assert_allclose(make("seq", weight, bits, granularity).first.detach().numpy(), expected, rtol=1e-12)


@each_case
def test_the_scale_may_start_at_the_least_squared_error(bits, granularity):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    found = make("seq", weight, bits, granularity, gamma_init="mse").first.detach().double().numpy()
    w, half = weight.double().numpy(), 2 ** (bits - 1)

    def error(s):
        return total((w - (np.clip(np.rint(w / s - 0.5), -half, half - 1) + 0.5) * s) ** 2, granularity)

    outermost = np.arange(0.3, 6.5, 0.01) / (half - 0.5)
    best = np.min([error(factor * mean(np.abs(w), granularity)) for factor in outermost], axis=0)
    assert (error(found) <= 1.02 * best).all()
