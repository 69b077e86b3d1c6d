"""The only quantization arithmetic: what trains, what is scored and what ships are the same numbers. See `Grid`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.quant.spec import ActivationRange, Grid, levels

SMALLEST = 1e-30  # of the scales that weights are divided by: no weight over it is infinite
AT_ONCE = 2**18  # weights that a CPU quantizes at once
NOTHING = 1.9e-38  # the least that activations are divided by; a row of this number alone would be divided by zero

Part = tuple[slice, slice]  # rows and columns


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
    return _codes(weight / positive(scale), grid).add_(0.0)


def _codes(places: Tensor, grid: Grid) -> Tensor:
    """Return the whole numbers nearest to weights over their scale, in memory of their own. -0.0 may be among them: who
    adds the shift, or 0.0, has the 0.0 that an integer code gives back."""
    rounded = (places - grid.shift).round_() if grid.shift else places.round()
    return rounded.clamp_(grid.low, grid.high)


def positive(scale: Tensor) -> Tensor:
    """Return the scale, fp32, fp64 or bf16, or next to nothing where it is 0: a row of zeros (a padding row) must give
    zeros, not NaN."""
    return scale.clamp(min=SMALLEST)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: Grid, reach: float) -> Tensor:
        divisor = positive(scale)
        # And no codes, which are sooner computed again than kept for all weights.
        ctx.save_for_backward(weight, scale, divisor)
        ctx.grid, ctx.reach = grid, reach
        if len(places := parts(weight)) == 1:
            return _levels(weight, scale, divisor, grid)
        levels = torch.empty_like(weight, dtype=scale.dtype)
        for place in places:
            levels[place] = _levels(weight[place], _of(scale, place), _of(divisor, place), grid)
        return levels

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale, divisor = ctx.saved_tensors
        settings = ctx.grid, ctx.reach, ctx.needs_input_grad[1]
        if len(places := parts(weight)) == 1:
            return *_gradients(grad, weight, scale, divisor, *settings), None, None
        grad_weight, of_scale = torch.empty_like(weight), torch.zeros_like(scale)
        for place in places:
            given = grad[place], weight[place], _of(scale, place), _of(divisor, place)
            grad_weight[place], of_part = _gradients(*given, *settings)
            if of_part is not None:
                _of(of_scale, place).add_(of_part)
        return grad_weight, of_scale, None, None


def parts(weight: Tensor) -> list[Part]:
    """Return rows and columns of the parts in which a weight (rows, columns) is quantized: all of it, but on a CPU as
    much as stays in its cache with what is computed from it. Memory that was not used before costs it more than the
    arithmetic does."""
    rows, columns = weight.shape
    if weight.device.type != "cpu" or weight.numel() <= AT_ONCE or torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    height = max(1, AT_ONCE // columns)
    return [
        (slice(row, row + height), slice(column, column + AT_ONCE))
        for row in range(0, rows, height)
        for column in range(0, columns, AT_ONCE)
    ]


def _of(scale: Tensor, place: Part) -> Tensor:
    """Return the scales of a part, (1, 1) or (rows, 1)."""
    return scale if len(scale) == 1 else scale[place[0]]


def _levels(weight: Tensor, scale: Tensor, divisor: Tensor, grid: Grid) -> Tensor:
    return _codes(weight / divisor, grid).to(scale.dtype).add_(grid.shift).mul_(scale)


def _gradients(
    grad: Tensor, weight: Tensor, scale: Tensor, divisor: Tensor, grid: Grid, reach: float, of_scale_too: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a weight and, where it is asked for, of its scale: see `fake_quantize`."""
    everywhere, of_scale = math.isinf(reach), None
    inside = _inside(weight, scale, grid, 0.0 if everywhere else reach)
    if of_scale_too:
        places = weight / divisor
        error = _codes(places, grid)
        if grid.shift:
            error.add_(grid.shift)
        of_scale = error.addcmul_(places, inside, value=-1).mul_(grad).sum_to_size(scale.shape)
        if grid.shift:  # a scale of zero stands for a row of zeros, at no level of this grid, which stays one
            of_scale.masked_fill_(scale == 0, 0)
    return grad if everywhere else inside.mul_(grad), of_scale


def _inside(weight: Tensor, scale: Tensor, grid: Grid, reach: float) -> Tensor:
    """Return 1 for weights between the outermost levels, or up to `reach` scales beyond them, and 0 for others."""
    lowest, highest = grid.low + grid.shift - reach, grid.high + grid.shift + reach
    if lowest == -highest:
        return weight.abs().lt_(highest * scale)
    return ((weight > lowest * scale) & (weight < highest * scale)).to(weight.dtype)


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
        rows = values.reshape(-1, values.shape[-1] if over == "token" else values.numel())
        quantized = _around_zero(rows, levels(bits)) if symmetric else _from_low(rows, 2**bits - 1, from_zero)
        return quantized.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None


def activation_codes(rows: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a matmul's input (tokens, columns) at 8 bits: int8 codes, and by token, (tokens, 1), the distance of two
    levels and the lowest one. `fake_quantize_activation` is lowest + (code + 128) * distance; symmetric levels, which
    have no lowest, are code * distance."""
    if symmetric:
        codes, most = _codes_around_zero(rows, levels(8))
        seen = 0 * codes.sum(1, keepdim=True)  # an integer is never NaN, and an input that has one is to be seen
        return codes.to(torch.int8), most / levels(8) + seen, None
    codes, scale, low = _codes_from_low(rows, 255, from_zero=False)
    return codes.sub_(128).to(torch.int8), scale, low


def _from_low(rows: Tensor, high: int, from_zero: bool) -> Tensor:
    """Return rows at the nearest of the levels 0..high over high times each row's range, from its least or zero on."""
    codes, scale, low = _codes_from_low(rows, high, from_zero)
    return torch.addcmul(low, codes, scale, out=codes)


def _codes_from_low(rows: Tensor, high: int, from_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0..high, the distance of two levels, and the lowest level."""
    nothing, zero = (_number(value, rows.device) for value in (NOTHING, 0.0))
    low = zero if from_zero else rows.amin(1, keepdim=True)
    above = rows - low
    scale = torch.add(nothing, above.amax(1, keepdim=True), alpha=1 / high)
    return above.div_(scale).round_(), scale, low  # in place: a CPU takes longer for memory than for this


def _around_zero(rows: Tensor, high: int) -> Tensor:
    """Return rows at the nearest of the levels -high..high over high times each row's largest magnitude.

    Compilers, which join operations, are given it plainly. Without one each costs, and this has the same bits on a CPU,
    in four:
    a distance from next to nothing is the magnitude, and not zero; 1.5 * 2^23 has no bits beside it for a fraction, so
    that adding it rounds.
    """
    if torch.compiler.is_compiling():
        most = rows.abs().amax(1, keepdim=True).clamp(min=NOTHING)
        return (rows * high / most).round() * (1 / high) * most
    codes, most = _codes_around_zero(rows, high)
    return torch.addcmul(_number(0.0, rows.device), codes, most, value=1 / high, out=codes)


def _codes_around_zero(rows: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Return codes -high..high, and each row's largest magnitude."""
    nothing, rounds = (_number(value, rows.device) for value in (NOTHING, 1.5 * 2**23))
    most = torch.cdist(rows, nothing.expand(1, rows.shape[1]), p=math.inf)
    return torch.addcdiv(rounds, rows, most, value=high).sub_(rounds), most


def _number(value: float, device: torch.device) -> Tensor:
    """Return a number as operations on tensors alone take it."""
    return torch.full((), value, device=device) if torch.compiler.is_compiling() else _kept_number(value, device)


@cache
def _kept_number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)
