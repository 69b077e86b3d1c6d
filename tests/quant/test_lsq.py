import math

import numpy as np
import pytest
import torch

from pipeline.quant.quantizers.base import SMALLEST_GAMMA, after_step
from tests.quant.cases import GRANULARITIES, clipping_steps, example, make, mean, passed, total, trained

CASES = [(name, bits, g) for name in ("lsq", "lsq_symmetric") for bits in (2, 4, 8) for g in GRANULARITIES]
each_case = pytest.mark.parametrize(("name", "bits", "granularity"), CASES)


def ends(name, bits):
    """Q_N and Q_P: the published grid is all of two's complement."""
    half = 2 ** (bits - 1)
    return (half - 1 if name == "lsq_symmetric" else half), half - 1


def reference(w, s, g, name, bits, granularity, clipped=True):
    """Esser et al. 2020, equations 1 to 3 and 5, and the gradient scale of section 2.2."""
    negative, positive = ends(name, bits)
    quantized = np.rint(np.clip(w / s, -negative, positive)) * s
    inside = (-negative < w / s) & (w / s < positive)
    slope = np.where(inside, np.rint(w / s) - w / s, np.where(w / s <= -negative, -negative, positive))
    weights = w.shape[1] if granularity == "per_channel" else w.size
    ds = total(g * slope, granularity) / np.sqrt(weights * positive)
    return quantized, np.where(inside, g, 0) if clipped else g, ds


@each_case
@pytest.mark.parametrize("ste", ["auto", "clipped", "identity"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_match_the_formulas(name, bits, granularity, ste, dtype, tolerance):
    weight, upstream = example(dtype)
    quantizer = make(name, weight, bits, granularity, ste=ste)
    quantizer.first.data = clipping_steps(weight, bits, granularity)
    quantized, dw = passed(quantizer, weight, upstream)
    given = [t.detach().double().numpy() for t in (weight, quantizer.first, upstream)]
    expected = reference(*given, name, bits, granularity, ste != "identity")
    assert 0 < (reference(*given, name, bits, granularity)[1] == 0).sum() < weight.numel()
    for ours, theirs in zip((quantized, dw, (quantizer.gamma.grad / quantizer.first).numpy()), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@each_case
def test_the_scale_starts_as_published(name, bits, granularity):
    weight, _ = example()
    expected = 2 * mean(np.abs(weight.numpy()), granularity) / math.sqrt(ends(name, bits)[1])
    np.testing.assert_allclose(make(name, weight, bits, granularity).first.detach().numpy(), expected, rtol=1e-12)


@each_case
def test_the_scale_may_start_at_the_least_squared_error(name, bits, granularity):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    found = make(name, weight, bits, granularity, gamma_init="mse").first.detach().double().numpy()
    w, (negative, positive) = weight.double().numpy(), ends(name, bits)

    def error(s):
        return total((w - np.clip(np.rint(w / s), -negative, positive) * s) ** 2, granularity)

    outermost = np.arange(0.3, 6.5, 0.01) / negative
    best = np.min([error(factor * mean(np.abs(w), granularity)) for factor in outermost], axis=0)
    assert (error(found) <= 1.02 * best).all()


def test_two_bits_have_four_levels_or_three():
    weight = torch.linspace(-4, 4, 33).unsqueeze(0)
    for name, levels in (("lsq", [-2, -1, 0, 1]), ("lsq_symmetric", [-1, 0, 1])):
        quantizer = make(name, weight)
        quantizer.first.data = torch.ones(1, 1)
        assert quantizer(weight).unique().tolist() == levels


def test_the_ends_of_the_published_grid_are_outside_each_on_its_side():
    weight = torch.tensor([[-1.0, -0.75, 0.25, 0.5]], requires_grad=True)
    quantizer = make("lsq", weight.detach())
    quantizer.first.data = torch.tensor([[0.5]])
    assert quantizer(weight).tolist() == [[-1, -1, 0, 0.5]]
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert weight.grad.tolist() == [[0, 10, 100, 0]]
    slopes = 1 * -2 + 10 * (-2 + 1.5) + 100 * (0 - 0.5) + 1000 * 1
    assert quantizer.gamma.grad.item() == pytest.approx(0.5 * slopes / math.sqrt(4))  # the scale is gamma times 0.5


@pytest.mark.parametrize("name", ["lsq", "lsq_symmetric", "seq"])
def test_a_scale_stays_positive_and_what_is_above_stays_as_it_is(name):
    weight, _ = example(torch.float32)
    quantizer = make(name, weight, 2, "per_channel")
    quantizer.gamma.data[:3] = torch.tensor([[-1.0], [0.0], [1e-30]])
    after_step([(quantizer, weight, None)])
    assert quantizer.gamma[:3].flatten().tolist() == [pytest.approx(SMALLEST_GAMMA)] * 3
    assert torch.equal(quantizer.gamma[3:], torch.ones(len(weight) - 3, 1))
    assert quantizer.gamma.requires_grad
    assert not quantizer.first.requires_grad


def test_a_scale_driven_down_stays_positive():
    weight, _ = example(torch.float32)
    quantizer = make("lsq", weight, 2, "per_channel")
    upstream = quantizer.grid.high * weight.sign()  # growing levels grow the loss
    trained(quantizer, weight, upstream, steps=30, lr=1.0)
    assert (quantizer.scale_of(weight) > 0).all()
