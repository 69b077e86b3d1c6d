"""Loss-aware quantization (Hou & Kwok 2018): the scale minimises sum_i D_i (w_i - w_q,i)^2, D from curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.quant.grid import nearest_codes
from pipeline.quant.quantizers.base import WeightQuantizer, least_error_scale, mean_abs
from pipeline.quant.spec import QuantSpec

ROUNDS = 10
EPSILON = 1e-8
CONVERGED = 1e-6


class LAQ(WeightQuantizer):
    """D = sqrt(v) + eps from Adam's second moment v: the diagonal of the curvature, up to a factor.

    The scale is recomputed after each optimizer step, starting from the last one, and is constant for the gradient,
    which passes straight through.
    """

    published_ste = "identity"
    curvature = True

    def start(self, folded: Tensor, spec: QuantSpec) -> None:
        self.scale = nn.Parameter(least_error_scale(folded, self.grid), requires_grad=False)

    def scale_of(self, folded: Tensor) -> Tensor:
        return self.scale

    def refresh(self, weight: Tensor, second_moment: Tensor | None) -> None:
        folded = self.granularity.fold(weight)
        importance = torch.ones_like(folded)
        if self.curvature:
            if second_moment is None:
                raise ValueError("LAQ weights its error by Adam's second moment, and Adam does not move this weight")
            importance = self.granularity.fold(second_moment).sqrt() + EPSILON
        # Rows that were all zero and no longer are: no round gets away from a scale of zero.
        alive = ((self.scale == 0) & (mean_abs(folded) > 0))[:, 0]
        if alive.any():
            self.scale[alive] = least_error_scale(folded[alive], self.grid)
        for _ in range(ROUNDS):
            codes = nearest_codes(folded, self.scale, self.grid)
            scale = self._minimiser(codes, folded, importance)
            change = ((scale - self.scale).abs() / self.scale.clamp(min=EPSILON)).max()
            self.scale.copy_(scale)
            if change < CONVERGED:
                break

    def _minimiser(self, codes: Tensor, folded: Tensor, importance: Tensor) -> Tensor:
        """Return sum(D b w) / sum(D b^2) for fixed codes b; the scale as it is where all codes are zero."""
        above = (importance * codes * folded).sum(1, keepdim=True)
        below = (importance * codes.square()).sum(1, keepdim=True)
        return torch.where(below > 0, above / torch.where(below > 0, below, 1), self.scale)


class UniformLAQ(LAQ):
    """D = 1: the same without curvature, which is least squares."""

    curvature = False
