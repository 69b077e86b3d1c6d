import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant import grid as arithmetic
from pipeline.quant.grid import NOTHING, dequantize, fake_quantize, fake_quantize_activation, quantize
from pipeline.quant.quantizers.base import mean_abs
from pipeline.quant.spec import grid

WIDTHS = (2, 4, 8)
GRIDS = [(kind, bits) for kind in ("symmetric", "full", "midpoint") for bits in WIDTHS]
each_grid = pytest.mark.parametrize(("kind", "bits"), GRIDS)
properties = settings(max_examples=150, deadline=None, derandomize=True)


def codes_and_levels(kind, bits):
    """Every code and the level it stands for in units of the step, by the definition of each kind."""
    half = 2 ** (bits - 1)
    codes = np.arange(1 - half if kind == "symmetric" else -half, half)
    return codes, codes + 0.5 if kind == "midpoint" else codes.astype(np.float64)


def edges(kind, bits, reach):
    """Between which the gradient passes, in steps; an infinite reach leaves the step's gradient as with none."""
    levels = codes_and_levels(kind, bits)[1]
    beyond = 0.0 if math.isinf(reach) else reach
    return levels[0] - beyond, levels[-1] + beyond


@st.composite
def weights_and_steps(draw):
    """Ragged float32 matrices over many magnitudes, some rows zero, and a step per row or per tensor."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    weight[torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))] = 0.0
    magnitude = weight.abs().mean(1, keepdim=True) if draw(st.booleans()) else weight.abs().mean().reshape(1, 1)
    kind, bits = draw(st.sampled_from(GRIDS))
    step = magnitude * draw(st.floats(1e-3, 6.0)) / (2 ** (bits - 1) - 1)
    return weight, step, kind, bits


@properties
@given(weights_and_steps())
def test_fake_quantize_equals_dequantize_of_quantize(case):
    weight, step, kind, bits = case
    codes = quantize(weight, step, grid(kind, bits))
    possible, _ = codes_and_levels(kind, bits)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert possible[0] <= int(codes.min()) <= int(codes.max()) <= possible[-1]
    assert torch.equal(fake_quantize(weight, step, grid(kind, bits)), dequantize(codes, step, grid(kind, bits)))


@each_grid
def test_fake_quantize_equals_dequantize_of_quantize_in_the_sign_of_zero_too(kind, bits):
    weight, step = torch.tensor([[-1e-3, 1e-3, -0.0, 0.9]]), torch.full((1, 1), 1 / (2 ** (bits - 1) - 1))
    for scale in (step, step * 0):
        shipped = dequantize(quantize(weight, scale, grid(kind, bits)), scale, grid(kind, bits))
        trained = fake_quantize(weight, scale, grid(kind, bits))
        assert torch.equal(trained.view(torch.int32), shipped.view(torch.int32))


@properties
@given(weights_and_steps())
def test_a_weight_on_its_grid_stays_there(case):
    weight, step, kind, bits = case
    codes = quantize(weight, step, grid(kind, bits))
    on_grid = dequantize(codes, step, grid(kind, bits))
    alive = (step > 0).expand_as(codes)
    assert torch.equal(quantize(on_grid, step, grid(kind, bits))[alive], codes[alive])


@properties
@given(weights_and_steps())
def test_no_level_is_nearer_than_the_one_chosen(case):
    weight, step, kind, bits = case
    w, s, chosen = (t.double().numpy() for t in (weight, step, fake_quantize(weight, step, grid(kind, bits))))
    nearest = np.abs(w[..., None] - codes_and_levels(kind, bits)[1] * s[..., None]).min(-1)
    assert (np.abs(w - chosen) <= nearest + 1e-6 * (np.abs(w) + s)).all()  # places are computed in float32


@each_grid
@pytest.mark.parametrize("rows_of_step", [1, 5])
def test_codes_are_the_nearest_levels(kind, bits, rows_of_step):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    step = torch.rand(rows_of_step, 1, generator=generator, dtype=torch.float64) + 0.5
    step /= 2 ** (bits - 1) - 1
    w, s = weight.numpy(), step.numpy()
    codes, levels = codes_and_levels(kind, bits)
    nearest = np.abs(w[..., None] - levels * s[..., None]).argmin(-1)
    assert np.array_equal(quantize(weight, step, grid(kind, bits)).numpy(), codes[nearest])
    quantized = fake_quantize(weight, step, grid(kind, bits)).numpy()
    np.testing.assert_allclose(quantized, s * levels[nearest], rtol=1e-14)


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_even_code(kind, bits, dtype):
    codes, levels = codes_and_levels(kind, bits)
    between = torch.tensor((levels[:-1] + levels[1:]) / 2, dtype=dtype).unsqueeze(0)
    even = [int(low if low % 2 == 0 else low + 1) for low in codes[:-1]]
    assert quantize(between, torch.ones(1, 1, dtype=dtype), grid(kind, bits)).tolist() == [even]


@each_grid
@pytest.mark.parametrize("reach", [0.0, 0.5, math.inf])
def test_a_weight_exactly_at_the_edge_counts_as_outside(kind, bits, reach):
    step, (low, high), levels = 0.75, edges(kind, bits, reach), codes_and_levels(kind, bits)[1]
    weight = torch.tensor([[low * step, high * step, 3 * low * step, 3 * high * step]], requires_grad=True)
    size = torch.tensor([[step]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    quantized = fake_quantize(weight, size, grid(kind, bits), reach)
    quantized.backward(upstream)
    torch.testing.assert_close(quantized, torch.tensor([[levels[0], levels[-1]] * 2]).float() * step)
    assert torch.equal(weight.grad, torch.zeros(1, 4) if not math.isinf(reach) else upstream)
    assert size.grad.item() == levels[0] * 101 + levels[-1] * 1010


@each_grid
@pytest.mark.parametrize("reach", [0.0, 0.5])
def test_a_weight_just_within_the_edge_counts_as_inside(kind, bits, reach):
    step, (low, high), levels = 0.75, edges(kind, bits, reach), codes_and_levels(kind, bits)[1]
    edge = torch.tensor([[low * step, high * step]])
    weight = torch.nextafter(edge, torch.zeros(1, 2)).requires_grad_()
    size = torch.tensor([[step]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0]])
    fake_quantize(weight, size, grid(kind, bits), reach).backward(upstream)
    assert torch.equal(weight.grad, upstream)
    inner = (levels[0] - low) + 10 * (levels[-1] - high)  # the reach, else nothing
    assert size.grad.item() == pytest.approx(inner, abs=1e-3)


@each_grid
@pytest.mark.parametrize("reach", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("rows_of_step", [1, 5])
def test_gradients_match_the_formulas(kind, bits, reach, rows_of_step):
    generator = torch.Generator().manual_seed(bits)
    weight = (torch.randn(5, 40, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    upstream = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    step = torch.rand(rows_of_step, 1, generator=generator, dtype=torch.float64) + 0.5
    step = (step / (2 ** (bits - 1) - 1)).requires_grad_()
    fake_quantize(weight, step, grid(kind, bits), reach).backward(upstream)
    w, s, g = (t.detach().numpy() for t in (weight, step, upstream))
    (low, high), levels = edges(kind, bits, reach), codes_and_levels(kind, bits)[1]
    level = levels[np.abs(w[..., None] / s[..., None] - levels).argmin(-1)]
    inside = (low < w / s) & (w / s < high)
    assert 0 < inside.sum() < inside.size
    terms = g * np.where(inside, level - w / s, level)
    expected = terms.sum(1, keepdims=True) if rows_of_step > 1 else terms.sum().reshape(1, 1)
    np.testing.assert_array_equal(weight.grad.numpy(), g if math.isinf(reach) else np.where(inside, g, 0))
    np.testing.assert_allclose(step.grad.numpy(), expected, rtol=1e-10, atol=1e-10)


@each_grid
@pytest.mark.parametrize("reach", [0.0, 0.5, math.inf])
def test_a_zero_row_gives_zeros_and_finite_gradients(kind, bits, reach):
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]], requires_grad=True)
    step = torch.tensor([[0.0], [2.0]], requires_grad=True)
    quantized = fake_quantize(weight, step, grid(kind, bits), reach)
    quantized.sum().backward()
    assert quantized[0].tolist() == [0, 0, 0]
    assert quantize(weight.detach(), step.detach(), grid(kind, bits))[0].tolist() == [0, 0, 0]
    assert torch.isfinite(weight.grad).all()
    assert step.grad[0].item() == 0
    assert torch.isfinite(step.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_refuses_values_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.tensor([[1.0, bad]]), torch.ones(1, 1), grid("symmetric", 8))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(torch.ones(2, 2), torch.tensor([[1.0], [bad]]), grid("full", 8))


def test_quantize_refuses_a_negative_step_naming_it():
    with pytest.raises(ValueError, match=r"negative \(-0\.25\)"):
        quantize(torch.ones(2, 2), torch.tensor([[1.0], [-0.25]]), grid("symmetric", 8))


@each_grid
def test_training_sees_a_nan_as_a_nan(kind, bits):
    quantized = fake_quantize(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1), grid(kind, bits))
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


@pytest.mark.parametrize("part", [7, 40, 1000])
@pytest.mark.parametrize("kind", ["symmetric", "midpoint", "full"])
@pytest.mark.parametrize("scales", [1, 9])
def test_a_weight_that_is_quantized_in_parts_is_that_of_the_whole(kind, scales, part, monkeypatch):
    generator = torch.Generator().manual_seed(9)
    weight, upstream = (torch.randn(9, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(scales, 1, generator=generator, dtype=torch.float64)
    scale[0] = 0 if scales > 1 else 1
    results = []
    for size in (2**18, part):
        monkeypatch.setattr(arithmetic, "AT_ONCE", size)
        ours = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        levels = fake_quantize(*ours, grid(kind, 2), 0.5)
        levels.backward(upstream)
        results.append((levels.detach(), ours[0].grad, ours[1].grad, mean_abs(weight)))
    (levels, of_weight, *sums), (*in_parts, of_scale, mean) = results
    assert torch.equal(levels, in_parts[0])
    assert torch.equal(of_weight, in_parts[1])
    torch.testing.assert_close([of_scale, mean], sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_code_lies_beyond_the_outermost_whatever_the_magnitude(symmetric, over):
    """From half the largest float over 255 down to the least there is, with and without a zero among them."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(400, 64, generator=generator) * 10.0 ** torch.linspace(-44, 35, 400).unsqueeze(1)
    rows[::3, 5] = 0
    for x in rows.unsqueeze(1):
        quantized = fake_quantize_activation(x, 8, symmetric, over)
        x, quantized = x.double(), quantized.double()
        low, high = (-x.abs().max(), x.abs().max()) if symmetric else (x.min(), x.max())
        step = (high - low) / (254 if symmetric else 255)
        slack = step * 1e-4 + 256 * NOTHING
        assert ((quantized - x).abs() <= step / 2 + slack).all()
        assert low - slack <= quantized.min()
        assert quantized.max() <= high + slack


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_stay_zeros_beside_others(symmetric, from_zero):
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(8))
    x[1] = 0
    quantized = fake_quantize_activation(x, 8, symmetric, "token", from_zero)
    assert torch.equal(quantized[1], x[1])
    assert not torch.signbit(quantized[1]).any()
    assert (quantized[[0, 2]] != 0).any()
    x[2, 3] = torch.nan
    quantized = fake_quantize_activation(x, 8, symmetric, "token", from_zero)
    assert torch.isnan(quantized[2]).any()
    assert not torch.isnan(quantized[:2]).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).tiny, 1e-45, 1e-30, 1e36])
def test_rows_of_one_number_are_themselves(value, symmetric):
    x = torch.tensor([[value] * 3, [-value] * 3])
    torch.testing.assert_close(fake_quantize_activation(x, 8, symmetric), x, rtol=1e-6, atol=NOTHING)


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_compilers_are_given_of_an_activation_has_the_bits_of_torchs_operation(symmetric, from_zero):
    torch._dynamo.reset()
    compiled = torch.compile(fake_quantize_activation, backend="eager", fullgraph=True)
    x = torch.randn(3, 40, 33, generator=torch.Generator().manual_seed(6)) * 10.0 ** torch.arange(-2.0, 1).view(3, 1, 1)
    x[1, 0] = 0
    given = x.abs() if from_zero else x
    for over in ("token", "tensor"):
        expected = fake_quantize_activation(given, 8, symmetric, over, from_zero)
        assert torch.equal(compiled(given, 8, symmetric, over, from_zero), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32_and_keep_their_dtype(symmetric, dtype):
    x = (torch.randn(4, 32, generator=torch.Generator().manual_seed(5)) * 2).to(dtype).requires_grad_()
    quantized = fake_quantize_activation(x, 8, symmetric)
    quantized.sum().backward()
    assert quantized.dtype == x.grad.dtype == dtype
    assert torch.equal(quantized, fake_quantize_activation(x.detach().float(), 8, symmetric).to(dtype))
