from itertools import pairwise, product

import numpy as np
import pytest
import torch

from pipeline.quant.quantizers.base import after_step
from tests.quant.cases import GRANULARITIES, clipping_steps, example, make, mean, nearest, passed, total

CASES = [(name, bits, g) for name in ("laq", "laq_uniform") for bits in (2, 4, 8) for g in GRANULARITIES]
each_case = pytest.mark.parametrize(("name", "bits", "granularity"), CASES)


def moments(dtype=torch.float64):
    """Second moments over some orders of magnitude."""
    return torch.randn(9, 31, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul(3).exp().to(dtype)


def importance(name, v):
    return np.sqrt(v) + 1e-8 if name == "laq" else np.ones_like(v)


def coded(w, alpha, bits):
    """b = round(clip(w / alpha, -1, 1) n) / n."""
    n = 2 ** (bits - 1) - 1
    return nearest(np.clip(w / alpha, -1, 1), np.arange(-n, n + 1) / n)


def objective(w, alpha, d, bits, granularity):
    return total(d * (w - alpha * coded(w, alpha, bits)) ** 2, granularity)


def alternated(w, alpha, d, bits, granularity, rounds):
    """Codes for the scale, then the scale sum(D b w) / sum(D b^2) for the codes, so many times."""
    for _ in range(rounds):
        b = coded(w, alpha, bits)
        alpha = total(d * b * w, granularity) / total(d * b * b, granularity)
    return alpha


def off_its_start(name, weight, bits, granularity, **options):
    quantizer = make(name, weight, bits, granularity, **options)
    quantizer.scale.data = clipping_steps(weight, bits, granularity)
    return quantizer


@each_case
@pytest.mark.parametrize("ste", ["auto", "identity", "clipped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_values_and_gradients_match_the_formulas(name, bits, granularity, ste, dtype, tolerance):
    weight, upstream = example(dtype)
    quantizer = off_its_start(name, weight, bits, granularity, ste=ste)
    quantized, dw = passed(quantizer, weight, upstream)
    w = weight.double().numpy()
    alpha = quantizer.scale.detach().double().numpy() * (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(quantized, alpha * coded(w, alpha, bits), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(dw, upstream.numpy() * ((np.abs(w) < alpha) | (ste != "clipped")))
    assert quantizer.scale.grad is None
    assert not quantizer.scale.requires_grad


@each_case
def test_the_scale_is_that_of_ten_alternations_from_the_last_one(name, bits, granularity):
    weight, _ = example()
    v, n = moments().numpy(), 2 ** (bits - 1) - 1
    quantizer = off_its_start(name, weight, bits, granularity)
    alpha = quantizer.scale.detach().numpy() * n
    for number in range(3):  # each goes on from the step before
        moved = weight * (1 + 0.2 * number)
        expected = alternated(moved.numpy(), alpha, importance(name, v), bits, granularity, rounds=10)
        after_step([(quantizer, moved, moments())])
        np.testing.assert_allclose(quantizer.scale.detach().numpy() * n, expected, rtol=1e-5)
        alpha = quantizer.scale.detach().numpy() * n


@each_case
def test_the_objective_never_grows(name, bits, granularity):
    weight, _ = example()
    w, d, n = weight.numpy(), importance(name, moments().numpy()), 2 ** (bits - 1) - 1
    quantizer = off_its_start(name, weight, bits, granularity)
    errors = [objective(w, quantizer.scale.detach().numpy() * n, d, bits, granularity)]
    for _ in range(4):
        after_step([(quantizer, weight, moments())])
        errors.append(objective(w, quantizer.scale.detach().numpy() * n, d, bits, granularity))
    assert all((after <= before * (1 + 1e-12)).all() for before, after in pairwise(errors))
    assert (errors[1] < errors[0]).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_curvature_decides_which_weights_count(granularity):
    weight, _ = example()
    w, d = weight.numpy(), importance("laq", moments().numpy())
    found = {}
    for name in ("laq", "laq_uniform"):
        quantizer = make(name, weight, 2, granularity)
        after_step([(quantizer, weight, moments())])
        found[name] = quantizer.scale.detach().numpy()
    better, worse = (objective(w, found[name], d, 2, granularity) for name in ("laq", "laq_uniform"))
    assert (better <= worse * (1 + 1e-12)).all()  # equal where both choose the same codes of a row
    assert better.sum() < 0.999 * worse.sum()


@each_case
def test_equal_moments_make_it_least_squares(name, bits, granularity):
    weight, _ = example()
    expected = make("laq_uniform", weight, bits, granularity)
    after_step([(expected, weight, None)])
    for given in (torch.zeros_like(weight), torch.full_like(weight, 7.0)):
        quantizer = make(name, weight, bits, granularity)
        after_step([(quantizer, weight, given)])
        torch.testing.assert_close(quantizer.scale, expected.scale, rtol=1e-9, atol=0)


def test_curvature_needs_moments():
    weight, _ = example()
    with pytest.raises(ValueError, match="Adam's second moment"):
        after_step([(make("laq", weight, 2, "per_channel"), weight, None)])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_mean_magnitude_as_start_leads_to_a_scale_nearly_as_good_as_the_searched_one(bits, granularity):
    weight, _ = example()
    w, d, n = weight.numpy(), np.ones_like(weight.numpy()), 2 ** (bits - 1) - 1
    errors = {}
    for start in ("mean", "searched"):
        quantizer = make("laq_uniform", weight, bits, granularity)
        if start == "mean":
            quantizer.scale.data = torch.from_numpy(mean(np.abs(w), granularity) / n)
        for _ in range(20):
            after_step([(quantizer, weight, None)])
        errors[start] = objective(w, quantizer.scale.detach().numpy() * n, d, bits, granularity).sum()
    assert errors["mean"] <= 1.3 * errors["searched"]


@pytest.mark.parametrize("seed", range(8))
def test_ternary_steps_are_the_best_of_all_codes(seed):
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quantizer = make("laq_uniform", weight, 2, "per_channel")
    after_step([(quantizer, weight, None)])
    ours = objective(weight.numpy(), quantizer.scale.detach().numpy(), np.ones((3, 6)), 2, "per_channel")
    all_codes = np.array([codes for codes in product((-1, 0, 1), repeat=6) if any(codes)])
    for w, error in zip(weight.numpy(), ours[:, 0], strict=True):
        alphas = all_codes @ w / (all_codes**2).sum(1)
        assert error == pytest.approx(((w - alphas[:, None] * all_codes) ** 2).sum(1).min(), rel=1e-9)


@each_case
def test_no_step_nearby_serves_the_codes_better(name, bits, granularity):
    weight, _ = example()
    w, d, n = weight.numpy(), importance(name, moments().numpy()), 2 ** (bits - 1) - 1
    quantizer = make(name, weight, bits, granularity)
    for _ in range(6):
        after_step([(quantizer, weight, moments())])
    alpha = quantizer.scale.detach().numpy() * n
    b = coded(w, alpha, bits)
    ours = total(d * (w - alpha * b) ** 2, granularity)
    for factor in np.linspace(0.5, 1.5, 41):
        assert (ours <= total(d * (w - factor * alpha * b) ** 2, granularity) * (1 + 1e-9)).all()


def test_a_scale_with_nothing_but_zero_codes_stays_as_it_is():
    weight = torch.tensor([[0.1, -0.2, 0.3], [1.0, -2.0, 3.0]])
    quantizer = make("laq", weight, 2, "per_channel")
    quantizer.scale.data = torch.tensor([[8.0], [2.0]])
    after_step([(quantizer, weight, torch.ones(2, 3))])
    assert quantizer.scale[0].item() == 8
    assert quantizer.scale[1].item() == pytest.approx(2.5)  # of the codes 0, -1, 1


@each_case
def test_the_start_is_the_least_squared_error(name, bits, granularity):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    w, n = weight.double().numpy(), 2 ** (bits - 1) - 1
    found = make(name, weight, bits, granularity).scale.detach().double().numpy() * n
    ones, means = (
        np.ones_like(w),
        total(np.abs(w), granularity) / (w.shape[1] if granularity == "per_channel" else w.size),
    )
    tried = [objective(w, factor * means, ones, bits, granularity) for factor in np.arange(0.4, 6.5, 0.1)]
    assert (objective(w, found, ones, bits, granularity) <= 1.02 * np.min(tried, axis=0)).all()
