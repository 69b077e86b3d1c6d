"""What the quantized modules and the representations do while a student trains: the two diagnoses of Tao et al. 2022.

Section 2.2 finds that quantization makes the representations of different tokens alike (`token_cosine`), and that
modules differ in how their weights are distributed against the clip (`Watch`, `weight_histograms`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.sharded import whole
from pipeline.quant.modules import quantizers
from pipeline.quant.quantizers.base import mean_abs

BINS, WIDEST = 60, 6.0  # of a histogram of weights, in multiples of the mean magnitude


def token_cosine(states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines between different tokens of the same row, summed over rows' means, and the number of rows that had
    two tokens: states (batch, length, hidden), and which tokens are valid, bool (batch, length)."""
    tokens = valid.sum(1).double()
    whole = F.normalize(states.double(), dim=-1).masked_fill(~valid.unsqueeze(-1), 0).sum(1).square().sum(-1)
    several = tokens >= 2
    means = (whole - tokens) / (tokens * (tokens - 1)).clamp(min=1)
    return (means * several).sum(), several.sum()


class Watch:
    """Remembers each module's codes, so that it can say how many have changed since it last looked: on the CPU, as they
    come back from a checkpoint and take no memory of a GPU."""

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}
        self.step = -math.inf  # of the last look

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> dict[str, dict[str, float]]:
        """Return by module `gamma`, the outermost level over mean |w| (of several scales: their mean), the share of
        `zeros`, and the share of codes `changed_per_100_steps`, absent at the first look."""
        facts = {}
        for name, latent, quantizer in quantizers(model):
            weight = whole(latent)
            codes, scale = quantizer.freeze(weight)
            edge = quantizer.granularity.fold_scale(scale) * quantizer.grid.edge
            magnitude = mean_abs(quantizer.granularity.fold(weight))
            alive = magnitude > 0
            measures = {
                "gamma": float((edge / magnitude)[alive].mean()),
                "zeros": float((codes == 0).float().mean()) if quantizer.grid.shift == 0 else 0.0,
            }
            codes = codes.cpu()
            if name in self.codes and step > self.step:
                changed = float((codes != self.codes[name]).float().mean())
                measures["changed_per_100_steps"] = changed * 100 / (step - self.step)
            self.codes[name], facts[name] = codes.clone(), measures
        self.step = step
        return facts


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by module counts of latent weights in equal bins over -6..6 mean |w|, the outer bins holding what lies
    beyond, and the outermost levels in the same unit."""
    histograms = {}
    for name, weight, quantizer in quantizers(model):
        mean = weight.abs().mean()
        _, scale = quantizer.freeze(weight)
        relative = (weight / torch.where(mean == 0, 1, mean)).clamp(-WIDEST, WIDEST)
        histograms[name] = {
            "counts": [int(n) for n in torch.histc(relative.float().cpu(), BINS, -WIDEST, WIDEST)],
            "highest_level": float(scale.mean() * (quantizer.grid.high + quantizer.grid.shift) / mean),
            "lowest_level": float(scale.mean() * (quantizer.grid.low + quantizer.grid.shift) / mean),
        }
    return histograms
