"""The only quantization arithmetic: what trains, what is scored and what ships are the same numbers.

A weight sits on a grid, w_q = (code + shift) * step with whole-number codes low..high: see `Grid`. `fake_quantize` is
`dequantize(quantize(.))` by construction. Activations are quantized dynamically by their own range.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.quant.spec import ActivationRange, Grid, levels


def quantize(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Codes of `weight`, int8, same shape: the nearest levels; ties round to even.

    Args:
        weight: (rows, columns).
        step: distance between two levels, positive or zero, (1, 1) or (rows, 1); zero for weights that are all zero.

    Raises:
        ValueError: weight or step holds a NaN or an infinity, or step is negative.
    """
    refuse_diverged(weight, step)
    return nearest(weight, step, grid).to(torch.int8)


def refuse_diverged(weight: Tensor, step: Tensor) -> None:
    """Raises ValueError for what cannot be quantized: NaN, infinity, a negative step."""
    if not (torch.isfinite(weight).all() and torch.isfinite(step).all()):
        raise ValueError("cannot quantize: the weight or its step holds NaN or infinity")
    if (step < 0).any():
        raise ValueError(f"cannot quantize: the step is negative ({step.min().item():g})")


def dequantize(codes: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """(codes + shift) * step in the step's dtype; step is (1, 1) or (rows, 1)."""
    levels = codes.to(step.dtype)
    return (levels + grid.shift if grid.shift else levels) * step


def fake_quantize(weight: Tensor, step: Tensor, grid: Grid, reach: float = 0.0) -> Tensor:
    """`dequantize(quantize(weight, step), step)`, bit for bit, with a straight-through gradient.

    With v = weight / step, the weight's gradient is g where v lies between the outermost levels, or up to `reach` steps
    beyond them, and 0 outside; the step's is the sum over its weights of g * (level - v) within and g * level outside,
    where level = code + shift. That is LSQ's (Esser et al. 2020, equations 3 and 5); with step = gamma * mean |w| / n
    it is Tao et al. 2022, section 3.3. An infinite reach passes every weight's gradient and takes the step's with no
    reach. NaN passes through, so a diverged loss is seen as one.
    """
    return cast(Tensor, _FakeQuantize.apply(weight, step, grid, reach))  # type: ignore[no-untyped-call]


def nearest(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Whole-number codes of the nearest levels, in the weight's dtype."""
    places = weight / nonzero(step)
    if grid.shift:
        places = places - grid.shift
    # + 0.0 turns -0.0 into 0.0, which is what an integer code gives back
    return places.round().clamp(grid.low, grid.high) + 0.0


def nonzero(step: Tensor) -> Tensor:
    """The step, or 1 where it is 0: a row of zeros (a padding row) must give zeros, not NaN."""
    return torch.where(step == 0, torch.ones_like(step), step)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, grid: Grid, reach: float) -> Tensor:
        codes = nearest(weight, step, grid)
        ctx.save_for_backward(weight, step, codes)
        ctx.grid, ctx.reach = grid, reach
        return dequantize(codes, step, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, step, codes = ctx.saved_tensors
        grid: Grid = ctx.grid
        everywhere = math.isinf(ctx.reach)
        reach = 0.0 if everywhere else ctx.reach
        inside = (weight > (grid.low + grid.shift - reach) * step) & (weight < (grid.high + grid.shift + reach) * step)
        grad_weight = grad if everywhere else grad * inside
        if not ctx.needs_input_grad[1]:
            return grad_weight, None, None, None
        error = codes + grid.shift - torch.where(inside, weight / nonzero(step), 0)
        # A step of zero stands for a row of zeros, which stays one.
        return grad_weight, (grad * error).sum_to_size(step.shape) * (step != 0), None, None


def fake_quantize_activation(
    x: Tensor, bits: int, symmetric: bool, over: ActivationRange = "token", from_zero: bool = False
) -> Tensor:
    """Dynamic min-max quantization of a matmul's input; the gradient passes straight through.

    One range per token (the last axis) or per tensor. Symmetric: 2^b - 1 levels over [-max|x|, max|x|];
    asymmetric: 2^b levels over [min x, max x], or over [0, max x] with `from_zero`, which softmax rows need so that
    their range does not tell how many later tokens are masked. Computed in fp32, returned in x's dtype.
    """
    with torch.no_grad():
        values = x.float()
        rows = values if over == "token" else values.reshape(1, -1)
        if symmetric:
            alpha = rows.abs().amax(-1, keepdim=True)
            quantized = alpha * ((rows / nonzero(alpha)).mul(levels(bits)).round() / levels(bits))
        else:
            low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
            low = torch.zeros_like(low) if from_zero else low
            step = (high - low) / (2**bits - 1)
            quantized = low + step * ((rows - low) / nonzero(step)).round()
        quantized = quantized.reshape(x.shape).to(x.dtype)
    return quantized + (x - x.detach())
