import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.grid import dequantize
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.quantizers.base import SMALLEST_GAMMA, after_step, least_error_scale
from pipeline.quant.quantizers.quantgpt import QuantGPT
from tests.quant.cases import make, passed

CASES = [(b, g, s) for b in (2, 4, 8) for g in ("per_tensor", "per_channel") for s in ("clipped", "identity")]
each_case = pytest.mark.parametrize(("bits", "granularity", "ste"), CASES)


def mean_magnitude(w, granularity):
    return np.abs(w).mean(axis=1, keepdims=True) if granularity == "per_channel" else np.abs(w).mean().reshape(1, 1)


def nearest_level(u, bits):
    n = 2 ** (bits - 1) - 1
    grid = np.arange(-n, n + 1) / n
    return grid[np.abs(u[..., None] - grid).argmin(-1)]


def reference(w, gamma, g, bits, granularity, ste):
    """The forward pass and both gradients by the method's formulas, in float64."""
    mean = mean_magnitude(w, granularity)
    alpha = gamma * mean
    q = nearest_level(np.clip(w, -alpha, alpha) / alpha, bits)
    inside = np.abs(w) < alpha
    dw = g if ste == "identity" else np.where(inside, g, 0)
    terms = np.where(inside, g * (q - w / alpha) * mean, g * q * mean)
    return (
        alpha * q,
        dw,
        terms.sum(axis=1, keepdims=True) if granularity == "per_channel" else terms.sum().reshape(1, 1),
    )


def example(granularity, dtype=torch.float64):
    """Weights with heavy tails, so that the clip acts on both sides, an upstream gradient, and gamma off its start."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(9, 31, generator=generator, dtype=torch.float64) ** 3 * 0.02
    upstream = torch.randn(9, 31, generator=generator, dtype=torch.float64)
    gamma = 0.7 + 2 * torch.rand(9 if granularity == "per_channel" else 1, 1, generator=generator, dtype=torch.float64)
    return weight.to(dtype), upstream.to(dtype), gamma.to(dtype)


def run(weight, upstream, gamma, bits, granularity, ste, **options):
    quantizer = make("quantgpt", weight, bits, granularity, gamma_init="one", ste=ste, **options)
    quantizer.gamma.data = gamma.clone()
    return *passed(quantizer, weight, upstream), quantizer.gamma.grad.numpy()


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_forward_and_gradients_match_the_formulas(bits, granularity, ste, dtype, tolerance):
    weight, upstream, gamma = example(granularity, dtype)
    expected = reference(*(t.double().numpy() for t in (weight, gamma, upstream)), bits, granularity, ste)
    for ours, theirs in zip(run(weight, upstream, gamma, bits, granularity, ste), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@each_case
def test_gradients_match_finite_differences_of_the_surrogate(bits, granularity, ste):
    weight, upstream, gamma = example(granularity)
    w, g, gamma0 = weight.numpy(), upstream.numpy(), gamma.numpy()
    mean, eps = mean_magnitude(w, granularity), 1e-7
    alpha0 = gamma0 * mean
    assert np.abs(np.abs(w) - alpha0).min() > 10 * eps * mean.max()  # no difference quotient straddles the clip
    u0 = np.clip(w, -alpha0, alpha0) / alpha0
    held = nearest_level(u0, bits) - u0

    def surrogate(w, gamma):
        alpha = gamma * mean
        return alpha * (np.clip(w, -alpha, alpha) / alpha + held)

    dw = g * (surrogate(w + eps, gamma0) - surrogate(w - eps, gamma0)) / (2 * eps)
    dgamma = g * (surrogate(w, gamma0 + eps) - surrogate(w, gamma0 - eps)) / (2 * eps)
    dgamma = dgamma.sum(axis=1, keepdims=True) if granularity == "per_channel" else dgamma.sum().reshape(1, 1)
    _, ours_dw, ours_dgamma = run(weight, upstream, gamma, bits, granularity, ste)
    compared = np.abs(w) < alpha0 if ste == "identity" else np.full(w.shape, True)
    np.testing.assert_allclose(ours_dw[compared], dw[compared], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours_dgamma, dgamma, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ours_dw[~compared], g[~compared])


def test_the_mean_magnitude_follows_the_weight():
    weight, _, _ = example("per_channel", torch.float32)
    quantizer = make("quantgpt", weight, 4, "per_channel")
    assert torch.equal(quantizer(weight * 8), quantizer(weight) * 8)


def test_one_row_does_not_depend_on_the_others():
    weight, _, gamma = example("per_channel", torch.float32)
    quantizer = make("quantgpt", weight, 4, "per_channel")
    quantizer.gamma.data = gamma
    alone = make("quantgpt", weight[3:4], 4, "per_channel")
    alone.gamma.data = gamma[3:4]
    assert torch.equal(quantizer(weight)[3:4], alone(weight[3:4]))


@pytest.mark.parametrize("ste", ["clipped", "identity"])
@pytest.mark.parametrize("gamma_init", ["one", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_rows_give_zeros_and_finite_gradients(bits, gamma_init, ste):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    quantizer = make("quantgpt", weight, bits, "per_channel", gamma_init=gamma_init, ste=ste)
    latent = weight.clone().requires_grad_()
    quantizer(latent).square().sum().backward()
    assert quantizer(latent)[1].tolist() == [0] * 6
    assert torch.isfinite(quantizer.gamma).all()
    assert torch.isfinite(quantizer.gamma.grad).all()
    assert torch.isfinite(latent.grad).all()
    codes, scale = quantizer.freeze(weight)
    assert codes[1].tolist() == [0] * 6
    assert scale[1].item() == 0


@each_case
def test_freeze_gives_the_numbers_of_the_forward_pass(bits, granularity, ste):
    weight, _, gamma = example(granularity, torch.float32)
    quantizer = make("quantgpt", weight, bits, granularity, gamma_init="one", ste=ste)
    quantizer.gamma.data = gamma
    codes, scale = quantizer.freeze(weight)
    assert codes.dtype == torch.int8
    assert scale.shape == quantizer.gamma.shape == ((9, 1) if granularity == "per_channel" else (1, 1))
    assert torch.equal(dequantize(codes, scale, quantizer.grid), quantizer(weight))


def outer_reference(w, gamma, g, bits, granularity):
    """PACT's gradient for gamma: the part of the weights at or beyond the clip alone."""
    mean = mean_magnitude(w, granularity)
    terms = np.where(np.abs(w) >= gamma * mean, g * np.sign(w) * mean, 0)
    return terms.sum(axis=1, keepdims=True) if granularity == "per_channel" else terms.sum().reshape(1, 1)


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_the_outer_gradient_is_that_of_weights_beyond_the_clip_alone(bits, granularity, ste, dtype, tolerance):
    weight, upstream, gamma = example(granularity, dtype)
    both = run(weight, upstream, gamma, bits, granularity, ste)
    outer = run(weight, upstream, gamma, bits, granularity, ste, gamma_gradient="outer")
    np.testing.assert_array_equal(outer[0], both[0])
    np.testing.assert_array_equal(outer[1], both[1])
    given = (t.double().numpy() for t in (weight, gamma, upstream))
    expected = outer_reference(*given, bits, granularity)
    assert np.abs(expected - both[2]).max() > 1e-5
    np.testing.assert_allclose(outer[2], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("gamma_gradient", "inner"), [("both", 100 * (1 - 0.5) * 2), ("outer", 0)])
def test_a_weight_exactly_at_alpha_moves_gamma_as_one_beyond_it(gamma_gradient, inner):
    weight = torch.tensor([[-2.0, 2.0, 1.0 + 2**-20, 3.0 - 2**-20]])  # the mean magnitude is 2
    quantizer = make("quantgpt", weight, 2, gamma_gradient=gamma_gradient)
    _, dw = passed(quantizer, weight, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert dw.tolist() == [[0, 0, 100, 0]]
    assert quantizer.gamma.grad.item() == pytest.approx((-1 + 10 + 1000) * 2 + inner, abs=1e-3)


def test_after_a_step_gamma_is_positive_and_the_rest_is_left_alone():
    quantizer = make("quantgpt", torch.ones(3, 2), 2, "per_channel")
    quantizer.gamma.data = torch.tensor([[-0.5], [0.0], [1.5]])
    after_step([(quantizer, torch.ones(3, 2), None)])
    assert quantizer.gamma.flatten().tolist() == pytest.approx([SMALLEST_GAMMA, SMALLEST_GAMMA, 1.5])
    assert quantizer.gamma.requires_grad


def test_gamma_starts_at_one_or_at_the_least_squared_error():
    weight, _, _ = example("per_channel", torch.float32)
    weight[2] = 0
    quantizers = {
        start: make("quantgpt", weight, 4, "per_channel", gamma_init=start) for start in ("one", "mse", "auto")
    }
    assert torch.equal(quantizers["one"].gamma, torch.ones(9, 1))
    found = least_error_scale(weight, quantizers["mse"].grid)
    alive = torch.arange(9) != 2
    torch.testing.assert_close(quantizers["mse"].scale_of(weight), found)
    assert (quantizers["mse"].gamma[alive] != 1).all()
    assert quantizers["mse"].gamma[2].item() == 1  # nothing to choose for a row of zeros
    assert torch.equal(quantizers["auto"].gamma, quantizers["mse"].gamma)
    assert torch.equal(make("quantgpt", weight, 2, "per_channel").gamma, torch.ones(9, 1))
    assert QUANTIZERS["quantgpt"] is QuantGPT


def squared_error(w, gamma, bits, granularity):
    alpha = gamma * mean_magnitude(w, granularity)
    n = 2 ** (bits - 1) - 1
    error = (w - np.rint(np.clip(w / alpha, -1, 1) * n) / n * alpha) ** 2
    return error.sum(axis=1, keepdims=True) if granularity == "per_channel" else error.sum().reshape(1, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_gamma_of_least_error_is_within_two_percent_of_a_fine_grid(bits, granularity):
    weight = torch.randn(12, 768, generator=torch.Generator().manual_seed(0)) * 0.05
    found = make("quantgpt", weight, bits, granularity, gamma_init="mse").gamma.detach()
    w = weight.double().numpy()
    best = np.min([squared_error(w, gamma, bits, granularity) for gamma in np.arange(0.4, 6.5, 0.01)], axis=0)
    ours = squared_error(w, found.double().numpy(), bits, granularity)
    assert (ours <= 1.02 * best).all(), (ours / best).max()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    weight=st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=2, max_size=4),
    bits=st.sampled_from([2, 4, 8]),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
)
def test_gamma_of_least_error_is_never_worse_than_one(weight, bits, granularity):
    weight = torch.tensor([*weight, [1, -2, 3, 5]], dtype=torch.float32)  # not all zero

    def error(gamma_init):
        quantizer = make("quantgpt", weight, bits, granularity, gamma_init=gamma_init)
        rows = (weight - quantizer(weight)).double().square().sum(1).detach()
        return rows if granularity == "per_channel" else rows.sum()

    assert (error("mse") <= error("one") * (1 + 1e-6)).all()  # the search itself ranks in float32
