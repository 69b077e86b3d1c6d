"""Statistics-based ternary weights (TBT, Liu et al., ACL 2023): the grid follows from the weights' own mean and spread.

Recalled, not seen: with mu the mean of the weights, alpha = 4/3 mean |w - mu| and codes round(clip((w - mu) / alpha,
-1, 1)). The mean is not added back, so that codes and one scale are all that ships.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quant.grid import fake_quantize, quantize
from pipeline.quant.quantizers.step import StepQuantizer, mean_abs, reduce_mean

SPREAD = 4 / 3


class Statistics(StepQuantizer):
    """Nothing is learned; mean and spread are constants for the gradient."""

    def centred(self, weight: Tensor) -> Tensor:
        return weight - reduce_mean(weight.detach(), self.granularity)

    def step(self, weight: Tensor) -> Tensor:
        """Of a weight that is already centred."""
        return SPREAD * mean_abs(weight, self.granularity)

    def forward(self, weight: Tensor) -> Tensor:
        centred = self.centred(weight)
        return fake_quantize(centred, self.step(centred), self.grid, self.reach)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        centred = self.centred(weight)
        step = self.step(centred)
        return quantize(centred, step, self.grid), step
