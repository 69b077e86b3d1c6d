"""Ternary weight networks (Li et al. 2016), as TernaryBERT (Zhang et al. 2020) uses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.quant.grid import dequantize, refuse_diverged
from pipeline.quant.quantizers.base import WeightQuantizer, mean_abs

THRESHOLD = 0.7  # of mean |w|


class TWN(WeightQuantizer):
    """Codes are the signs of weights beyond 0.7 mean |w|; the scale is the mean |w| of those. Nothing is learned.

    These codes are not the nearest levels, so quantizing has its own threshold here; values and gradient follow the
    same law: levels in the forward pass, straight through in the backward one.
    """

    published_ste = "identity"

    def scale_of(self, folded: Tensor) -> Tensor:
        return self._codes_and_scale(folded)[1]

    def fake_quantize(self, folded: Tensor) -> Tensor:
        codes, scale = self._codes_and_scale(folded)
        passing = folded
        if math.isfinite(self.reach):
            edge = (self.grid.high + self.reach) * scale
            passing = torch.where(folded.detach().abs() < edge, folded, folded.detach())
        return dequantize(codes, scale, self.grid) + (passing - passing.detach())

    def quantize(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = self._codes_and_scale(folded)
        refuse_diverged(folded, scale)
        return codes.to(torch.int8), scale

    @torch.no_grad()
    def _codes_and_scale(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = folded.abs()
        beyond = magnitude > THRESHOLD * mean_abs(folded)
        count = beyond.sum(1, keepdim=True)
        scale = (magnitude * beyond).sum(1, keepdim=True) / count.clamp(min=1)
        return folded.sign() * beyond + 0.0, scale
