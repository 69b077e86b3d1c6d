"""Linear layers whose forward product is one of integers: 8-bit codes of inputs and of weights on their grids."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.quant.grid import activation_codes, parts, positive
from pipeline.quant.spec import Grid

FEW = 16  # tokens, with which GPUs do not multiply integers
WIDTH = 8  # that GPUs want sizes to be multiples of
LONGEST = 2**16  # columns, whose products of 8 bits add up to less than 2^31


class Codes(NamedTuple):
    """A weight (rows, columns) on its grid: int8 codes times `scale`, (rows,), and the sums of each row's codes."""

    codes: Tensor
    scale: Tensor
    sums: Tensor


def fit(x: Tensor, levels: Tensor, grid: Grid) -> bool:
    """Tell whether the product of inputs (..., columns) at 8 bits and levels (rows, columns) of a grid is one of int8
    with nothing lost."""
    (rows, columns), edge = levels.shape, int(grid.edge * _parts_of_scale(grid))
    return (
        edge <= 128
        and x.numel() > FEW * columns
        and rows % WIDTH == columns % WIDTH == 0
        and columns <= LONGEST
        and _exact(x.device, edge)
    )


def codes_of(levels: Tensor, scale: Tensor, grid: Grid) -> Codes:
    """Return the codes of levels (rows, columns) whose distance is `scale`, (1, 1) or (rows, 1). Levels amid whole
    numbers are odd multiples of half a scale."""
    unit = (positive(scale) / _parts_of_scale(grid)).expand(len(levels), 1)
    codes = torch.empty_like(levels, dtype=torch.int8)
    for place in parts(levels):
        codes[place] = (levels[place] / unit[place[0]]).round_()
    seen = unit + 0 * levels.sum(1, keepdim=True)  # an integer is never NaN, and a diverged weight is to be seen
    return Codes(codes, seen[:, 0], codes.sum(1, dtype=torch.int32))


def integer_linear(x: Tensor, levels: Tensor, bias: Tensor | None, codes: Codes, symmetric: bool) -> Tensor:
    """Return `F.linear` of x (..., columns), quantized at 8 bits a token, and of levels (rows, columns), from their
    codes; straight-through gradients go to x, levels and bias in floating point. Like a linear layer it returns what
    autocast asks for."""
    return cast(Tensor, _IntegerLinear.apply(x, levels, bias, codes, symmetric))  # type: ignore[no-untyped-call]


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, bias: Tensor | None, codes: Codes, symmetric: bool) -> Tensor:
        inputs, step, low = activation_codes(x.float().reshape(-1, x.shape[-1]), symmetric)
        ctx.save_for_backward(levels, inputs, step, low)
        ctx.of_x = x.shape, x.dtype
        product = torch._int_mm(inputs, codes.codes.T)
        if low is not None:  # in integers, of which none is lost: x is low + (input + 128) * step
            product.add_(codes.sums, alpha=128)
        result = product.float().mul_(step)
        if low is not None:
            result.addcmul_(low, codes.sums.float())
        result.mul_(codes.scale)
        if bias is not None:
            result.add_(bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return result.view(*x.shape[:-1], -1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        levels, inputs, step, low = ctx.saved_tensors
        (shape, dtype), (for_x, for_levels, for_bias, *_) = ctx.of_x, ctx.needs_input_grad
        of_x = (grad @ levels.to(grad.dtype)).view(shape).to(dtype) if for_x else None
        of_levels = None
        if for_levels:
            values = inputs.float()
            values = values.mul_(step) if low is None else values.add_(128).mul_(step).add_(low)
            of_levels = (grad.T @ values.to(grad.dtype)).to(levels.dtype)
        return of_x, of_levels, grad.sum(0, dtype=levels.dtype) if for_bias else None, None, None


def _parts_of_scale(grid: Grid) -> int:
    """Return of how many units, of which all levels are multiples, a scale consists."""
    return 2 if grid.shift else 1


@cache
def _exact(device: torch.device, edge: int) -> bool:
    """Tell whether a device multiplies any 8-bit codes by such of up to `edge` exactly: CPUs without VNNI add up pairs
    of products in 16 bits, which those of 8-bit weights overflow."""
    inputs = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, 2 * FEW).repeat(2 * FEW, 1)
    weights = torch.tensor([[-edge], [edge - 1]], dtype=torch.int8).expand(2, 2 * FEW).repeat(2 * FEW, 1)
    product = torch._int_mm(inputs.to(device), weights.to(device).T).cpu()
    return torch.equal(product, inputs.int() @ weights.int().T)
