import numpy as np
import pytest
import torch

from tests.quant.cases import GRANULARITIES, example, make, mean, nearest, passed


def reference(w, granularity):
    """With mu the mean, alpha = 4/3 mean |w - mu| and codes round(clip((w - mu) / alpha, -1, 1))."""
    centred = w - mean(w, granularity)
    alpha = 4 / 3 * mean(np.abs(centred), granularity)
    return nearest(np.clip(centred / alpha, -1, 1), np.array([-1.0, 0, 1])), alpha, np.abs(centred) < alpha


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("ste", ["auto", "clipped", "identity"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_values_and_gradients_match_the_formulas(granularity, ste, dtype, tolerance):
    weight, upstream = example(dtype)
    quantizer = make("statistics", weight, 2, granularity, ste=ste)
    quantized, dw = passed(quantizer, weight, upstream)
    codes, alpha, inside = reference(weight.double().numpy(), granularity)
    assert set(np.unique(codes)) == {-1, 0, 1}
    np.testing.assert_allclose(quantized, codes * alpha, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(dw, upstream.numpy() * (inside | (ste == "identity")))
    assert list(quantizer.parameters()) == []


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_grid_follows_the_weights_and_not_where_they_were_at_the_start(granularity):
    weight, _ = example(torch.float32)
    quantizer = make("statistics", weight, 2, granularity)
    assert torch.equal(quantizer(weight * 8), quantizer(weight) * 8)
    torch.testing.assert_close(quantizer(weight + 0.5), quantizer(weight))  # the mean is not added back


def test_a_weight_exactly_at_the_clip_counts_as_outside():
    weight = torch.tensor([[-4.0, 4.0, 1.0, -1.0, 4.0, -4.0, 3.0, -3.0]], requires_grad=True)  # mean 0, spread 3
    quantizer = make("statistics", weight.detach())
    assert quantizer.scale_of(weight.detach()).item() == 4
    quantizer(weight).backward(torch.ones(1, 8))
    assert weight.grad.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
