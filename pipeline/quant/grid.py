"""The only quantization arithmetic: what trains, what is scored and what ships are the same numbers.

Weights sit on a symmetric grid, w_q = code * alpha / n with integer codes in -n..n and n = 2^(b-1) - 1
(Tao et al. 2022, section 3). `fake_quantize` is `dequantize(quantize(.))` by construction. Activations are
quantized dynamically by their own range.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pipeline.quant.spec import ActivationRange, Ste, levels


def quantize(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Codes of `weight`, int8, same shape; ties round to even.

    Args:
        weight: (rows, columns).
        alpha: clipping factor, positive or zero, (1, 1) or (rows, 1); zero for weights that are all zero.
        bits: 2, 4 or 8.

    Raises:
        ValueError: weight or alpha holds a NaN or an infinity, or alpha is negative.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(alpha).all()):
        raise ValueError("cannot quantize: the weight or its clipping factor holds NaN or infinity")
    if (alpha < 0).any():
        raise ValueError(f"cannot quantize: the clipping factor is negative ({alpha.min().item():g})")
    return _codes(weight, alpha, bits).to(torch.int8)


def step_size(alpha: Tensor, bits: int) -> Tensor:
    """alpha / n: the distance between two levels, which is the scale that ships beside the codes."""
    return alpha / levels(bits)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in the scale's dtype; scale (1, 1) or (rows, 1) is a `step_size`."""
    return codes.to(scale.dtype) * scale


def fake_quantize(weight: Tensor, alpha: Tensor, bits: int, ste: Ste = "clipped") -> Tensor:
    """`dequantize(quantize(weight, alpha), step_size(alpha))`, bit for bit, with a straight-through gradient.

    The gradient is that of alpha * (u + stop_gradient(Q(u) - u)) with u = clip(w, -alpha, alpha) / alpha:
    for the weight g inside the clip and 0 outside (`clipped`) or g everywhere (`identity`); for alpha
    g * Q(u) where |w| >= alpha and g * (Q(u) - w / alpha) inside (Tao et al. 2022, section 3.3, before the
    factor mean |w| that turns it into gamma's). NaN passes through, so a diverged loss is seen as one.
    """
    return cast(Tensor, _FakeQuantize.apply(weight, alpha, bits, ste))  # type: ignore[no-untyped-call]


def _codes(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    # + 0.0 turns -0.0 into 0.0, which is what an integer code gives back
    return (weight / _nonzero(alpha)).clamp(-1, 1).mul(levels(bits)).round() + 0.0


def _nonzero(alpha: Tensor) -> Tensor:
    # A row of zeros (a padding row) has alpha = 0 and must give zeros, not NaN.
    return torch.where(alpha == 0, torch.ones_like(alpha), alpha)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, bits: int, ste: Ste) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.bits, ctx.ste = bits, ste
        return dequantize(_codes(weight, alpha, bits), step_size(alpha, bits))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, alpha = ctx.saved_tensors
        inside = weight.abs() < alpha
        on_grid = _codes(weight, alpha, ctx.bits) / levels(ctx.bits)
        grad_weight = grad * inside if ctx.ste == "clipped" else grad
        error = on_grid - torch.where(inside, weight / _nonzero(alpha), 0)
        return grad_weight, (grad * error).sum_to_size(alpha.shape), None, None


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
            quantized = alpha * ((rows / _nonzero(alpha)).mul(levels(bits)).round() / levels(bits))
        else:
            low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
            low = torch.zeros_like(low) if from_zero else low
            step = (high - low) / (2**bits - 1)
            quantized = low + step * ((rows - low) / _nonzero(step)).round()
        quantized = quantized.reshape(x.shape).to(x.dtype)
    return quantized + (x - x.detach())
