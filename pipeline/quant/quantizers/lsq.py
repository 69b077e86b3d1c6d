"""Learned step size quantization (Esser et al. 2020), and what differs from it only in the levels."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize
from pipeline.quant.quantizers.base import WeightQuantizer, least_error_scale, mean_abs
from pipeline.quant.spec import QuantSpec


class LSQ(WeightQuantizer):
    """Learns the scale; its gradient is scaled by 1 / sqrt(N n), N the weights a scale serves, n the largest code.

    Levels are all 2^b of two's complement: four at 2 bits, which base3 cannot hold. The start is 2 mean |w| / sqrt(n).
    What the optimizer moves is gamma, the ratio of the scale to its start: Adam moves every parameter by about its
    rate, and scales differ by orders of magnitude between matrices where their ratios do not.
    """

    def start(self, folded: Tensor, spec: QuantSpec) -> None:
        published = not spec.starts_at_least_error(self.bits)
        first = self.published_start(folded) if published else least_error_scale(folded, self.grid)
        self.gradient_scale = 1 / math.sqrt(folded.shape[1] * self.grid.high)
        self.first = nn.Parameter(first, requires_grad=False)
        self.gamma = nn.Parameter(torch.ones_like(first))

    def published_start(self, folded: Tensor) -> Tensor:
        """Return the scale (rows, 1) that the quantizer was published with."""
        return 2 * mean_abs(folded) / math.sqrt(self.grid.high)

    def scale_of(self, folded: Tensor) -> Tensor:
        return self.gamma * self.first

    def fake_quantize(self, folded: Tensor) -> Tensor:
        scale = cast(Tensor, _ScaleGradient.apply(self.scale_of(folded), self.gradient_scale))  # type: ignore[no-untyped-call]
        return fake_quantize(folded, scale, self.grid, self.reach)

    def ratios(self) -> list[nn.Parameter]:
        return [self.gamma]


class SymmetricLSQ(LSQ):
    """LSQ on the symmetric grid: ternary at 2 bits, which packs at 1.6."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad * ctx.factor, None
