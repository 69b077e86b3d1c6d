"""Module-wise dynamic scaling (Tao et al. 2022, section 3.3): learn gamma in alpha = gamma * mean |w|.

The clipping factor alpha = n * step follows the weights as they move; only its ratio to their mean magnitude is
learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, nonzero
from pipeline.quant.quantizers.step import SMALLEST_GAMMA, StepQuantizer, least_error_step, mean_abs
from pipeline.quant.spec import Granularity, QuantSpec


class QuantGPT(StepQuantizer):
    """gamma is (1, 1) per tensor or (rows, 1) per row; mean |w| is recomputed at each call and is a constant for the
    gradient. With `gamma_gradient: outer` only weights at or beyond the clip move gamma, as in PACT: the paper's
    ablation."""

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__(weight, bits, granularity, spec)
        self.outer = spec.gamma_gradient == "outer"
        mean = mean_abs(weight, granularity)
        gamma = torch.ones_like(mean)
        if spec.starts_at_least_error(bits):
            found = least_error_step(weight.detach(), self.grid, granularity) * self.grid.high
            gamma = torch.where(found > 0, found / nonzero(mean), gamma)
        self.gamma = nn.Parameter(gamma)

    def step(self, weight: Tensor) -> Tensor:
        return self.gamma * mean_abs(weight, self.granularity) / self.grid.high

    def forward(self, weight: Tensor) -> Tensor:
        if not self.outer:
            return super().forward(weight)
        step = self.step(weight)
        inside = weight.detach().abs() < step.detach() * self.grid.high
        fixed = fake_quantize(weight, step.detach(), self.grid, self.reach)
        return torch.where(inside, fixed, fake_quantize(weight, step, self.grid, self.reach))

    def after_step(self, weight: Tensor, second_moment: Tensor | None) -> None:
        with torch.no_grad():
            self.gamma.clamp_(min=SMALLEST_GAMMA)
