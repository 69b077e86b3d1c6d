"""Module-wise dynamic scaling (Tao et al. 2022, section 3.3): learn gamma in alpha = n * scale = gamma * mean |w|."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, positive
from pipeline.quant.quantizers.base import WeightQuantizer, least_error_scale, mean_abs
from pipeline.quant.spec import QuantSpec


class QuantGPT(WeightQuantizer):
    """gamma has one value a scale; mean |w| is recomputed at each call and is a constant for the gradient. With
    `gamma_gradient: outer` only weights at or beyond the clip move gamma, as in PACT: the paper's ablation."""

    def start(self, folded: Tensor, spec: QuantSpec) -> None:
        self.outer = spec.gamma_gradient == "outer"
        mean = mean_abs(folded)
        gamma = torch.ones_like(mean)
        if spec.starts_at_least_error(self.bits):
            alpha = least_error_scale(folded, self.grid) * self.grid.high
            gamma = torch.where(alpha > 0, alpha / positive(mean), gamma)
        self.gamma = nn.Parameter(gamma)

    def scale_of(self, folded: Tensor) -> Tensor:
        return self.gamma * mean_abs(folded) / self.grid.high

    def fake_quantize(self, folded: Tensor) -> Tensor:
        if not self.outer:
            return super().fake_quantize(folded)
        scale = self.scale_of(folded)
        inside = folded.detach().abs() < scale.detach() * self.grid.high
        fixed = fake_quantize(folded, scale.detach(), self.grid, self.reach)
        return torch.where(inside, fixed, fake_quantize(folded, scale, self.grid, self.reach))

    def ratios(self) -> list[nn.Parameter]:
        return [self.gamma]
