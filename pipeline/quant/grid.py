"""The only quantization arithmetic: what trains, what is scored and what ships are the same numbers. See `Grid`."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.quant.spec import ActivationRange, Grid, levels


def quantize(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the codes of `weight`, int8, same shape: the nearest levels; ties round to even.

    Args:
        weight: (rows, columns).
        scale: distance between two levels, positive or zero, (1, 1) or (rows, 1); zero for weights that are all zero.

    Raises:
        ValueError: weight or scale holds a NaN or an infinity, or scale is negative.
    """
    refuse_diverged(weight, scale)
    return nearest_codes(weight, scale, grid).to(torch.int8)


def refuse_diverged(weight: Tensor, scale: Tensor) -> None:
    """Raise ValueError for a weight that cannot be quantized: NaN, infinity, a negative scale."""
    if not (torch.isfinite(weight).all() and torch.isfinite(scale).all()):
        raise ValueError("cannot quantize: the weight or its scale holds NaN or infinity")
    if (scale < 0).any():
        raise ValueError(f"cannot quantize: the scale is negative ({scale.min().item():g})")


def dequantize(codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return (codes + shift) * scale in the scale's dtype; scale is (1, 1) or (rows, 1)."""
    levels = codes.to(scale.dtype)
    return (levels + grid.shift if grid.shift else levels) * scale


def fake_quantize(weight: Tensor, scale: Tensor, grid: Grid, reach: float = 0.0) -> Tensor:
    """Return `dequantize(quantize(weight, scale), scale)`, bit for bit, with a straight-through gradient.

    With v = weight / scale, the weight's gradient is g where v lies between the outermost levels, or up to `reach`
    scales beyond them, and 0 outside; the scale's is the sum over its weights of g * (level - v) within and g * level
    outside, where level = code + shift. That is LSQ's (Esser et al. 2020, equations 3 and 5); with scale = gamma *
    mean |w| / n it is Tao et al. 2022, section 3.3. An infinite reach passes every weight's gradient and takes the
    scale's with no reach. NaN passes through, so a diverged loss is seen as one.
    """
    return cast(Tensor, _FakeQuantize.apply(weight, scale, grid, reach))  # type: ignore[no-untyped-call]


def nearest_codes(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the whole-number codes of the nearest levels, in the weight's dtype."""
    return _codes(weight / nonzero(scale), grid).add_(0.0)


def _codes(places: Tensor, grid: Grid) -> Tensor:
    """Return the whole numbers nearest to weights over their scale, in memory of their own. -0.0 may be among them: who
    adds the shift, or 0.0, has the 0.0 that an integer code gives back."""
    rounded = (places - grid.shift).round_() if grid.shift else places.round()
    return rounded.clamp_(grid.low, grid.high)


def nonzero(scale: Tensor) -> Tensor:
    """Return the scale, or 1 where it is 0: a row of zeros (a padding row) must give zeros, not NaN."""
    return scale + (scale == 0)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: Grid, reach: float) -> Tensor:
        ctx.save_for_backward(weight, scale)  # and no codes, which are sooner computed again than kept for all weights
        ctx.grid, ctx.reach = grid, reach
        return _codes(weight / nonzero(scale), grid).to(scale.dtype).add_(grid.shift).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        grid, everywhere = ctx.grid, math.isinf(ctx.reach)
        inside = _inside(weight, scale, grid, 0.0 if everywhere else ctx.reach)
        grad_weight = grad if everywhere else grad * inside
        if not ctx.needs_input_grad[1]:
            return grad_weight, None, None, None
        places = weight / nonzero(scale)
        error = _codes(places, grid).add_(grid.shift).sub_(places.mul_(inside))
        # A scale of zero stands for a row of zeros, which stays one.
        return grad_weight, error.mul_(grad).sum_to_size(scale.shape).masked_fill(scale == 0, 0), None, None


def _inside(weight: Tensor, scale: Tensor, grid: Grid, reach: float) -> Tensor:
    """Tell which weights lie between the outermost levels, or up to `reach` scales beyond them."""
    lowest, highest = grid.low + grid.shift - reach, grid.high + grid.shift + reach
    if lowest == -highest:
        return weight.abs() < highest * scale
    return (weight > lowest * scale) & (weight < highest * scale)


def fake_quantize_activation(
    x: Tensor, bits: int, symmetric: bool, over: ActivationRange = "token", from_zero: bool = False
) -> Tensor:
    """Return a matmul's input, quantized dynamically by its minimum and maximum; the gradient passes straight through.

    One range per token (the last axis), so that padding, batch and key-value cache change no result, or the paper's per
    tensor. Symmetric: 2^b - 1 levels over [-max|x|, max|x|];
    asymmetric: 2^b levels over [min x, max x], or over [0, max x] with `from_zero`, which softmax rows need so that
    their range does not tell how many later tokens are masked. Computed in fp32, returned in x's dtype.
    """
    return cast(Tensor, _FakeQuantizeActivation.apply(x, bits, symmetric, over, from_zero))  # type: ignore[no-untyped-call]


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool, over: ActivationRange, from_zero: bool) -> Tensor:
        values = x.float()
        rows = values if over == "token" else values.reshape(1, -1)
        if symmetric:
            alpha = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True)
            quantized = (rows / positive(alpha)).mul_(levels(bits)).round_().div_(levels(bits)).mul_(alpha)
        else:
            low, high = torch.aminmax(rows, dim=-1, keepdim=True)
            low = torch.zeros_like(low) if from_zero else low
            scale = (high - low) / (2**bits - 1)
            quantized = (rows - low).div_(positive(scale)).round_().mul_(scale).add_(low)
        return quantized.reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None


def positive(scale: Tensor) -> Tensor:
    """Return the scale, or next to nothing where it is 0, by which zeros can be divided."""
    return scale.clamp(min=torch.finfo(torch.float32).tiny)
