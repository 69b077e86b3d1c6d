import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.grid import dequantize, fake_quantize, fake_quantize_activation, quantize, step_size
from pipeline.quant.spec import levels

WIDTHS = (2, 4, 8)
properties = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def weights_and_alphas(draw):
    """Ragged float32 matrices over many magnitudes, some rows zero, and a clipping factor per row or per tensor."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    weight[torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))] = 0.0
    magnitude = weight.abs().mean(1, keepdim=True) if draw(st.booleans()) else weight.abs().mean().reshape(1, 1)
    return weight, magnitude * draw(st.floats(1e-3, 6.0))


@properties
@given(weights_and_alphas(), st.sampled_from(WIDTHS))
def test_fake_quantize_equals_dequantize_of_quantize(pair, bits):
    weight, alpha = pair
    codes = quantize(weight, alpha, bits)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert int(codes.abs().max()) <= levels(bits)
    assert torch.equal(fake_quantize(weight, alpha, bits), dequantize(codes, step_size(alpha, bits)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_fake_quantize_equals_dequantize_of_quantize_in_the_sign_of_zero_too(bits):
    weight, alpha = torch.tensor([[-1e-3, 1e-3, -0.0, 0.9]]), torch.ones(1, 1)
    shipped = dequantize(quantize(weight, alpha, bits), step_size(alpha, bits))
    assert torch.equal(fake_quantize(weight, alpha, bits).view(torch.int32), shipped.view(torch.int32))


@properties
@given(weights_and_alphas(), st.sampled_from(WIDTHS))
def test_a_weight_on_its_grid_stays_there(pair, bits):
    weight, alpha = pair
    codes = quantize(weight, alpha, bits)
    on_grid = dequantize(codes, step_size(alpha, bits))
    alive = (alpha > 0).expand_as(codes)
    assert torch.equal(quantize(on_grid, alpha, bits)[alive], codes[alive])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows_of_alpha", [1, 5])
def test_codes_are_the_nearest_levels(bits, rows_of_alpha):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    alpha = torch.rand(rows_of_alpha, 1, generator=generator, dtype=torch.float64) + 0.5
    w, a, n = weight.numpy(), alpha.numpy(), 2 ** (bits - 1) - 1
    grid = np.arange(-n, n + 1) / n
    nearest = np.abs((np.clip(w, -a, a) / a)[..., None] - grid).argmin(-1)
    assert np.array_equal(quantize(weight, alpha, bits).numpy(), nearest - n)
    np.testing.assert_allclose(fake_quantize(weight, alpha, bits).numpy(), a * grid[nearest], rtol=1e-14)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_even_code(bits, dtype):
    n = levels(bits)
    alpha = torch.full((1, 1), float(n), dtype=dtype)
    halves = torch.arange(-n, n, dtype=dtype).unsqueeze(0) + 0.5
    even = [2 * round((k + 0.5) / 2) for k in range(-n, n)]
    assert quantize(halves, alpha, bits).tolist() == [even]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("ste", ["clipped", "identity"])
def test_a_weight_exactly_at_alpha_counts_as_outside(bits, ste):
    weight = torch.tensor([[-0.75, 0.75, -2.0, 2.0]], requires_grad=True)
    alpha = torch.tensor([[0.75]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    quantized = fake_quantize(weight, alpha, bits, ste)
    quantized.backward(upstream)
    torch.testing.assert_close(quantized, torch.tensor([[-0.75, 0.75, -0.75, 0.75]]))
    assert torch.equal(weight.grad, upstream if ste == "identity" else torch.zeros(1, 4))
    assert alpha.grad.item() == -1 + 10 - 100 + 1000


@pytest.mark.parametrize("ste", ["clipped", "identity"])
def test_a_zero_row_gives_zeros_and_finite_gradients(ste):
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]], requires_grad=True)
    alpha = torch.tensor([[0.0], [2.0]], requires_grad=True)
    quantized = fake_quantize(weight, alpha, 4, ste)
    quantized.sum().backward()
    assert quantized[0].tolist() == [0, 0, 0]
    assert quantize(weight.detach(), alpha.detach(), 4)[0].tolist() == [0, 0, 0]
    assert torch.isfinite(weight.grad).all()
    assert alpha.grad[0].item() == 0
    assert torch.isfinite(alpha.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_refuses_values_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.tensor([[1.0, bad]]), torch.ones(1, 1), 8)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.ones(2, 2), torch.tensor([[1.0], [bad]]), 8)


def test_quantize_refuses_a_negative_clipping_factor_naming_it():
    with pytest.raises(ValueError, match=r"negative \(-0\.25\)"):
        quantize(torch.ones(2, 2), torch.tensor([[1.0], [-0.25]]), 8)


def test_training_sees_a_nan_as_a_nan():
    quantized = fake_quantize(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1), 2)
    assert quantized.isnan().tolist() == [[False, True]]


def activation_reference(x: torch.Tensor, symmetric: bool) -> np.ndarray:
    """Min-max quantization at 8 bits, one range for each vector along the last axis, in float64."""
    out = x.detach().double().numpy().copy()
    for row in out.reshape(-1, out.shape[-1]):
        if symmetric:
            step, origin = np.abs(row).max() / 127, 0.0
        else:
            step, origin = (row.max() - row.min()) / 255, row.min()
        if step > 0:
            row[:] = origin + step * np.rint((row - origin) / step)
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 7), (3, 4, 16), (2, 2, 5, 9)])
def test_activations_match_the_float64_reference(symmetric, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3 + 1
    quantized = fake_quantize_activation(x, 8, symmetric)
    np.testing.assert_allclose(quantized.numpy(), activation_reference(x, symmetric), rtol=0, atol=1e-6 * 12)
    whole = fake_quantize_activation(x, 8, symmetric, over="tensor")
    flat = activation_reference(x.reshape(1, -1), symmetric).reshape(shape)
    np.testing.assert_allclose(whole.numpy(), flat, rtol=0, atol=1e-6 * 12)


@pytest.mark.parametrize(("symmetric", "most"), [(True, 255), (False, 256)])
def test_activations_use_every_level_and_no_more(symmetric, most):
    x = torch.linspace(-1, 1, 20_000).unsqueeze(0)
    assert len(fake_quantize_activation(x, 8, symmetric).unique()) == most


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_does_not_depend_on_its_neighbours(symmetric):
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(4))
    together = fake_quantize_activation(x, 8, symmetric)
    for b in range(3):
        for t in range(6):
            assert torch.equal(fake_quantize_activation(x[b, t], 8, symmetric), together[b, t])
    padded = x.clone()
    padded[:, 4:] = 1e6
    assert torch.equal(fake_quantize_activation(padded, 8, symmetric)[:, :4], together[:, :4])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("over", ["token", "tensor"])
def test_the_gradient_of_activations_is_the_identity(symmetric, over):
    x = torch.randn(2, 3, 8, requires_grad=True)
    upstream = torch.randn(2, 3, 8)
    fake_quantize_activation(x, 8, symmetric, over).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_rows_keep_their_value(symmetric):
    x = torch.tensor([0.0, 0.3, -7.1, 1e-30, 1e30]).unsqueeze(1).expand(5, 6)
    assert torch.equal(fake_quantize_activation(x, 8, symmetric), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32_and_keep_their_dtype(symmetric, dtype):
    x = (torch.randn(4, 32, generator=torch.Generator().manual_seed(5)) * 2).to(dtype).requires_grad_()
    quantized = fake_quantize_activation(x, 8, symmetric)
    quantized.sum().backward()
    assert quantized.dtype == x.grad.dtype == dtype
    assert torch.equal(quantized, fake_quantize_activation(x.detach().float(), 8, symmetric).to(dtype))
