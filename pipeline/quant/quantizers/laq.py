"""Loss-aware quantization (Hou & Kwok 2018): the scale minimises sum_i D_i (w_i - w_q,i)^2, D from curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.quant.grid import nearest
from pipeline.quant.quantizers.step import StepQuantizer, least_error_step, mean_abs
from pipeline.quant.spec import Granularity, QuantSpec

ROUNDS = 10
EPSILON = 1e-8
CONVERGED = 1e-6


class LAQ(StepQuantizer):
    """D = sqrt(v) + eps from Adam's second moment v: the diagonal of the curvature, up to a factor.

    The step is recomputed after each optimizer step, starting from the last one, and is constant for the gradient,
    which passes straight through.
    """

    published_ste = "identity"
    curvature = True

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__(weight, bits, granularity, spec)
        start = mean_abs(weight, granularity) / self.grid.high
        if spec.gamma_init != "one":  # which is asked for where the step is about to be loaded
            start = least_error_step(weight.detach(), self.grid, granularity)
        self.size = nn.Parameter(start, requires_grad=False)

    def step(self, weight: Tensor) -> Tensor:
        return self.size

    @torch.no_grad()
    def after_step(self, weight: Tensor, second_moment: Tensor | None) -> None:
        importance = torch.ones_like(weight)
        if self.curvature:
            if second_moment is None:
                raise ValueError("LAQ weights its error by Adam's second moment, and Adam does not move this weight")
            importance = second_moment.sqrt() + EPSILON
        # Of weights that were all zero and no longer are: no round gets away from a step of zero.
        alive = (self.size == 0) & (mean_abs(weight, self.granularity) > 0)
        if alive.any():
            rows = alive[:, 0].expand(len(weight))
            self.size[alive[:, 0]] = least_error_step(weight[rows], self.grid, self.granularity)
        for _ in range(ROUNDS):
            codes = nearest(weight, self.size, self.grid)
            step = self._minimiser(codes, weight, importance)
            change = ((step - self.size).abs() / self.size.clamp(min=EPSILON)).max()
            self.size.copy_(step)
            if change < CONVERGED:
                break

    def _minimiser(self, codes: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
        """sum(D b w) / sum(D b^2) for fixed codes b; the step as it is where all codes are zero."""
        along = 1 if self.granularity == "row" else (0, 1)
        above = (importance * codes * weight).sum(along, keepdim=True)
        below = (importance * codes.square()).sum(along, keepdim=True)
        return torch.where(below > 0, above / torch.where(below > 0, below, 1), self.size)


class UniformLAQ(LAQ):
    """D = 1: the same without curvature, which is least squares."""

    curvature = False
