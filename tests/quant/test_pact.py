import numpy as np
import pytest
import torch

from pipeline.quant.quantizers.base import after_step
from tests.quant.cases import GRANULARITIES, example, make, mean, nearest, passed, total

CASES = [(bits, granularity) for bits in (2, 4, 8) for granularity in GRANULARITIES]
each_case = pytest.mark.parametrize(("bits", "granularity"), CASES)


def reference(w, low, high, g, bits, granularity):
    """x_c = clip(x, c-, c+), x_q = round(x_c S) / S with S = n / max |x_c|; the gradients of x, c- and c+."""
    n = 2 ** (bits - 1) - 1
    clipped = np.minimum(np.maximum(w, low), high)
    largest = np.abs(clipped).max(axis=1, keepdims=True) if granularity == "per_channel" else np.abs(clipped).max()
    quantized = nearest(clipped * n / largest, np.arange(-n, n + 1.0)) * largest / n
    above, below = w >= high, w <= low
    dw = np.where(above | below, 0, g)
    return quantized, dw, total(g * below, granularity), total(g * above, granularity)


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_values_and_gradients_match_the_formulas_with_ends_of_their_own(bits, granularity, dtype, tolerance):
    weight, upstream = example(dtype)
    generator = torch.Generator().manual_seed(2)
    rows = 9 if granularity == "per_channel" else 1
    low, high = (-0.4 - 0.3 * torch.rand(rows, 1, generator=generator), 1 + torch.rand(rows, 1, generator=generator))
    quantizer = make("pact", weight, bits, granularity)
    quantizer.low.data, quantizer.high.data = low.to(dtype), high.to(dtype)
    quantized, dw = passed(quantizer, weight, upstream)
    ends = [t.detach().double().numpy() for t in (quantizer.low, quantizer.high)]
    expected = reference(weight.double().numpy(), *ends, upstream.double().numpy(), bits, granularity)
    found = (quantized, dw, quantizer.low.grad.numpy(), quantizer.high.grad.numpy())
    assert all(e.any() for e in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_weights_exactly_at_an_end_belong_to_that_end():
    weight = torch.tensor([[-0.5, -0.25, 0.25, 1.0, 4.0]], requires_grad=True)
    quantizer = make("pact", weight.detach(), 2)
    quantizer.low.data, quantizer.high.data = torch.tensor([[-0.5]]), torch.tensor([[1.0]])
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]]))
    assert weight.grad.tolist() == [[0, 10, 100, 0, 0]]
    assert (quantizer.low.grad.item(), quantizer.high.grad.item()) == (1, 11000)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_ends_start_at_two_and_a_half(granularity):
    quantizer = make("pact", example()[0], 4, granularity)
    shape = (9, 1) if granularity == "per_channel" else (1, 1)
    assert torch.equal(quantizer.high, torch.full(shape, 2.5, dtype=torch.float64))
    assert torch.equal(quantizer.low, -quantizer.high)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_ends_may_start_at_the_least_squared_error(bits, granularity):
    weight = torch.randn(12, 768, generator=torch.Generator().manual_seed(0)) * 0.05
    quantizer = make("pact", weight, bits, granularity, gamma_init="mse")
    assert torch.equal(quantizer.low, -quantizer.high)
    w, n = weight.double().numpy(), 2 ** (bits - 1) - 1

    def error(high):
        step = high / n
        return total((w - np.rint(np.clip(w, -high, high) / step) * step).__pow__(2), granularity)

    best = np.min([error(factor * mean(np.abs(w), granularity)) for factor in np.arange(0.4, 6.5, 0.01)], axis=0)
    assert (error(quantizer.high.detach().double().numpy()) <= 1.02 * best).all()


def test_the_ends_do_not_cross_zero():
    quantizer = make("pact", torch.ones(3, 2), 2, "per_channel")
    quantizer.high.data, quantizer.low.data = torch.tensor([[-0.5], [0.0], [1.5]]), torch.tensor([[-0.5], [0.0], [1.5]])
    after_step([(quantizer, torch.ones(3, 2), None)])
    assert quantizer.high.flatten().tolist() == [0, 0, 1.5]
    assert quantizer.low.flatten().tolist() == [-0.5, 0, 0]
    quantized = quantizer(torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]))
    assert quantized.tolist() == [[0, -0.5], [0, 0], [1, 0]]
    quantized.square().sum().backward()
    assert torch.isfinite(quantizer.high.grad).all()
    assert torch.isfinite(quantizer.low.grad).all()


def test_a_weight_far_inside_the_start_gives_the_range_of_the_weight_itself():
    weight, _ = example(torch.float32, scale=1e-3)
    codes, step = make("pact", weight, 8).freeze(weight)
    assert step.item() == pytest.approx(weight.abs().max().item() / 127)
    assert codes.abs().max() == 127
