import numpy as np
import pytest
import torch

from pipeline.quant.grid import dequantize
from tests.quant.cases import GRANULARITIES, example, make, mean, passed, total


def reference(w, granularity):
    """Codes are the signs beyond 0.7 mean |w|; the scale is the mean |w| of those."""
    beyond = np.abs(w) > 0.7 * mean(np.abs(w), granularity)
    alpha = total(np.abs(w) * beyond, granularity) / total(beyond.astype(float), granularity)
    return np.sign(w) * beyond, alpha


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("ste", ["auto", "identity", "clipped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_values_and_gradients_match_the_formulas(granularity, ste, dtype, tolerance):
    weight, upstream = example(dtype)
    quantizer = make("twn", weight, 2, granularity, ste=ste)
    quantized, dw = passed(quantizer, weight, upstream)
    w, g = weight.double().numpy(), upstream.double().numpy()
    codes, alpha = reference(w, granularity)
    assert set(np.unique(codes)) == {-1, 0, 1}
    np.testing.assert_allclose(quantized, codes * alpha, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(dw, upstream.numpy() * ((np.abs(w) < alpha) | (ste != "clipped")))
    assert list(quantizer.parameters()) == []
    assert g.any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_codes_have_their_own_threshold(granularity):
    weight, _ = example(torch.float32)
    quantizer = make("twn", weight, 2, granularity)
    codes, step = quantizer.freeze(weight)
    expected, alpha = reference(weight.double().numpy(), granularity)
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_allclose(step.numpy(), alpha, rtol=1e-6)
    assert torch.equal(dequantize(codes, step, quantizer.grid), quantizer(weight))


def test_a_weight_at_the_threshold_is_not_beyond_it():
    weight = torch.tensor([[7.0, -7.0, 16.0, 10.0]]).double()  # the mean magnitude is 10
    threshold = 0.7 * 10
    assert threshold == 7.0
    codes, step = make("twn", weight).freeze(weight)
    assert codes.tolist() == [[0, 0, 1, 1]]
    assert step.item() == 13


def test_equal_magnitudes_are_kept_as_they_are():
    weight = torch.tensor([[0.5, -0.5, 0.5], [-2.0, -2.0, 2.0]])
    assert torch.equal(make("twn", weight, 2, "per_channel")(weight), weight)
