"""Learned step size quantization (Esser et al. 2020), and what differs from it only in the levels."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize
from pipeline.quant.quantizers.step import SMALLEST_GAMMA, StepQuantizer, least_error_step, mean_abs
from pipeline.quant.spec import Granularity, QuantSpec


class LSQ(StepQuantizer):
    """Learns the step; its gradient is scaled by 1 / sqrt(N n), N the weights a step serves, n the largest code.

    Levels are all 2^b of two's complement: four at 2 bits, which base3 cannot hold. The start is 2 mean |w| / sqrt(n).
    What the optimizer moves is gamma, the ratio of the step to its start: Adam moves every parameter by about its rate,
    and steps differ by orders of magnitude between matrices where their ratios do not.
    """

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__(weight, bits, granularity, spec)
        start = self.published_start(weight)
        if spec.starts_at_least_error(bits):
            start = least_error_step(weight.detach(), self.grid, granularity)
        weights = weight.shape[1] if granularity == "row" else weight.numel()
        self.gradient_scale = 1 / math.sqrt(weights * self.grid.high)
        self.start = nn.Parameter(start, requires_grad=False)
        self.gamma = nn.Parameter(torch.ones_like(start))

    def published_start(self, weight: Tensor) -> Tensor:
        return 2 * mean_abs(weight, self.granularity) / math.sqrt(self.grid.high)

    def step(self, weight: Tensor) -> Tensor:
        return self.gamma * self.start

    def forward(self, weight: Tensor) -> Tensor:
        scaled = cast(Tensor, _ScaleGradient.apply(self.step(weight), self.gradient_scale))  # type: ignore[no-untyped-call]
        return fake_quantize(weight, scaled, self.grid, self.reach)

    def after_step(self, weight: Tensor, second_moment: Tensor | None) -> None:
        with torch.no_grad():
            self.gamma.clamp_(min=SMALLEST_GAMMA)


class SymmetricLSQ(LSQ):
    """LSQ on the symmetric grid: ternary at 2 bits, which packs at 1.6."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad * ctx.scale, None
