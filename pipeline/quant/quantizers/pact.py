"""PACT for weights, two-sided (Choi et al. 2018, as Tao et al. 2022 compare it): both ends of the clip are learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, quantize, refuse_diverged
from pipeline.quant.quantizers.step import StepQuantizer, least_error_step, max_abs, mean_abs
from pipeline.quant.spec import Granularity, QuantSpec

PUBLISHED_START = 2.5


class PACT(StepQuantizer):
    """x_c = clip(x, low, high); x_q = round(x_c S) / S with S = n / max |x_c|, which the gradient takes as constant.

    The gradient of `high` is the sum of g where x >= high, likewise of `low`. The start of 2.5 lies far outside
    most weights; `gamma_init: mse` starts at the clip of least squared error instead.
    """

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__(weight, bits, granularity, spec)
        if spec.starts_at_least_error(bits):
            start = least_error_step(weight.detach(), self.grid, granularity) * self.grid.high
        else:
            start = torch.full_like(mean_abs(weight, granularity), PUBLISHED_START)
        self.high, self.low = nn.Parameter(start), nn.Parameter(-start)

    def clip(self, weight: Tensor) -> Tensor:
        return torch.where(weight >= self.high, self.high, torch.where(weight <= self.low, self.low, weight))

    def step(self, weight: Tensor) -> Tensor:
        """Of a weight that is already clipped."""
        return max_abs(weight, self.granularity) / self.grid.high

    def forward(self, weight: Tensor) -> Tensor:
        clipped = self.clip(weight)
        return fake_quantize(clipped, self.step(clipped), self.grid, reach=math.inf)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        clipped = self.clip(weight)
        step = self.step(clipped)
        refuse_diverged(weight, step)
        return quantize(clipped, step, self.grid), step

    def after_step(self, weight: Tensor, second_moment: Tensor | None) -> None:
        with torch.no_grad():
            self.high.clamp_(min=0.0)
            self.low.clamp_(max=0.0)
