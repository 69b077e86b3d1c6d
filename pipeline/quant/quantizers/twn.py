"""Ternary weight networks (Li et al. 2016), as TernaryBERT (Zhang et al. 2020) uses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.quant.grid import dequantize, refuse_diverged
from pipeline.quant.quantizers.step import StepQuantizer, mean_abs

THRESHOLD = 0.7  # of mean |w|


class TWN(StepQuantizer):
    """Codes are the signs of weights beyond 0.7 mean |w|; the scale is the mean |w| of those. Nothing is learned.

    These codes are not the nearest levels, so quantizing has its own threshold here; values and gradient follow the
    same law: levels in the forward pass, straight through in the backward one.
    """

    published_ste = "identity"

    def step(self, weight: Tensor) -> Tensor:
        return self._codes_and_step(weight)[1]

    def forward(self, weight: Tensor) -> Tensor:
        codes, step = self._codes_and_step(weight)
        passing = weight
        if math.isfinite(self.reach):
            edge = (self.grid.high + self.reach) * step
            passing = torch.where(weight.detach().abs() < edge, weight, weight.detach())
        return dequantize(codes, step, self.grid) + (passing - passing.detach())

    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, step = self._codes_and_step(weight)
        refuse_diverged(weight, step)
        return codes.to(torch.int8), step

    @torch.no_grad()
    def _codes_and_step(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = weight.abs()
        beyond = magnitude > THRESHOLD * mean_abs(weight, self.granularity)
        along = 1 if self.granularity == "row" else (0, 1)
        count = beyond.sum(along, keepdim=True)
        step = (magnitude * beyond).sum(along, keepdim=True) / count.clamp(min=1)
        return weight.sign() * beyond + 0.0, step
