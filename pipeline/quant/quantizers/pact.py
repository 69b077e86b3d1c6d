"""PACT for weights, two-sided (Choi et al. 2018, as Tao et al. 2022 compare it): both ends of the clip are learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, quantize, refuse_diverged
from pipeline.quant.quantizers.base import WeightQuantizer, least_error_scale, max_abs, mean_abs
from pipeline.quant.spec import QuantSpec

PUBLISHED_START = 2.5


class PACT(WeightQuantizer):
    """x_c = clip(x, low, high); x_q = round(x_c S) / S with S = n / max |x_c|, which the gradient takes as constant.

    The gradient of `high` is the sum of g where x >= high, likewise of `low`. The start of 2.5 lies far outside
    most weights; `gamma_init: mse` starts at the clip of least squared error instead.
    """

    def start(self, folded: Tensor, spec: QuantSpec) -> None:
        clip = torch.full_like(mean_abs(folded), PUBLISHED_START)
        if spec.starts_at_least_error(self.bits):
            clip = least_error_scale(folded, self.grid) * self.grid.high
        self.high, self.low = nn.Parameter(clip), nn.Parameter(-clip)

    def clip(self, folded: Tensor) -> Tensor:
        """Return the weight between both ends of the clip."""
        return torch.where(folded >= self.high, self.high, torch.where(folded <= self.low, self.low, folded))

    def scale_of(self, folded: Tensor) -> Tensor:
        """Return the scale of a weight that is already clipped."""
        return max_abs(folded) / self.grid.high

    def distance(self, folded: Tensor) -> Tensor:
        return self.scale_of(self.clip(folded))

    def fake_quantize(self, folded: Tensor) -> Tensor:
        clipped = self.clip(folded)
        return fake_quantize(clipped, self.scale_of(clipped), self.grid, reach=math.inf)

    def quantize(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        clipped = self.clip(folded)
        scale = self.scale_of(clipped)
        refuse_diverged(folded, scale)
        return quantize(clipped, scale, self.grid), scale

    def refresh(self, weight: Tensor, second_moment: Tensor | None) -> None:
        self.high.clamp_(min=0.0)
        self.low.clamp_(max=0.0)
