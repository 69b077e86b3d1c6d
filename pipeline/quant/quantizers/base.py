"""What quantizers share: a weight on a grid, folded to one scale a row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.quant.granularity import Granularity
from pipeline.quant.grid import fake_quantize, parts, quantize
from pipeline.quant.spec import Grid, QuantSpec, Ste, grid, levels_of

SMALLEST_GAMMA = 1e-3  # a learned ratio stays positive, and with it the scale
REACH = {"clipped": 0.0, "wide": 0.5, "identity": math.inf}


class WeightQuantizer(nn.Module, ABC):
    """Quantizes one weight (rows, columns) by as many scales as its granularity has.

    Subclasses see the weight folded, one scale (rows, 1) a row, and say what the scale is. Everything that `freeze`
    depends on is the weight or a parameter of the quantizer (without gradient if it is computed rather than learned),
    so that checkpoints hold it.
    """

    published_ste: ClassVar[Ste] = "clipped"

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__()
        self.bits, self.granularity = bits, granularity
        self.grid = grid(levels_of(spec.quantizer), bits)
        self.reach = REACH[self.published_ste if spec.ste == "auto" else spec.ste]
        self.blend = 1.0  # of the quantized weight in a training pass: see `QuantizedWeight`
        self.start(granularity.fold(weight.detach()), spec)

    def start(self, folded: Tensor, spec: QuantSpec) -> None:
        """Make the parameters, if the quantizer has any, for a weight as training begins."""

    @abstractmethod
    def scale_of(self, folded: Tensor) -> Tensor:
        """Return the distance between two levels of each row, (rows, 1)."""

    def distance(self, folded: Tensor) -> Tensor:
        """Return the distance between two levels of each row, (rows, 1), of a weight that nothing was done to."""
        return self.scale_of(folded)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid, with a straight-through gradient."""
        return self.granularity.unfold(self.fake_quantize(self.granularity.fold(weight)), weight.shape)

    def fake_quantize(self, folded: Tensor) -> Tensor:
        """Return the folded weight on its grid."""
        return fake_quantize(folded, self.scale_of(folded), self.grid, self.reach)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, int8, in the weight's shape, and the scales that ship beside them, as they are stored."""
        codes, scale = self.quantize(self.granularity.fold(weight))
        rows, columns = weight.shape
        stored = scale.detach().reshape(self.granularity.scale_shape((rows, columns))).clone()
        return self.granularity.unfold(codes, weight.shape).contiguous(), stored

    def quantize(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of the folded weight, and its scales (rows, 1)."""
        scale = self.scale_of(folded)
        return quantize(folded, scale, self.grid), scale

    def refresh(self, weight: Tensor, second_moment: Tensor | None) -> None:
        """Bring parameters that are computed up to date, and keep others in their range. Where workers share a weight
        out it is a part, and not to be looked at."""

    def ratios(self) -> list[nn.Parameter]:
        """Return the learned parameters that are to stay at SMALLEST_GAMMA or above."""
        return []


@torch.no_grad()
def after_step(moved: Iterable[tuple[WeightQuantizer, Tensor, Tensor | None]]) -> None:
    """Have quantizers take note of an optimizer step: each with its weight, and the weight's second moment in Adam, if
    it has one."""
    ratios: list[Tensor] = []
    for quantizer, weight, second_moment in moved:
        quantizer.refresh(weight, second_moment)
        ratios += quantizer.ratios()
    if ratios:
        torch._foreach_clamp_min_(ratios, SMALLEST_GAMMA)


def mean_abs(folded: Tensor) -> Tensor:
    """Return ||w||_1 / numel of each row, (rows, 1), detached."""
    folded = folded.detach()
    if len(places := parts(folded)) == 1:
        return folded.abs().mean(1, keepdim=True)
    total = folded.new_zeros(len(folded), 1)
    for place in places:
        total[place[0]] += folded[place].abs().sum(1, keepdim=True)
    return total / folded.shape[1]


def max_abs(folded: Tensor) -> Tensor:
    """Return the largest magnitude of each row, (rows, 1), detached."""
    return folded.detach().abs().amax(1, keepdim=True)


@torch.no_grad()
def least_error_scale(folded: Tensor, grid: Grid) -> Tensor:
    """Return the scale of each row, (rows, 1), that minimises ||w - w_q||^2, by a coarse and a fine search; 0 for a row
    of zeros.

    The search runs over outermost levels between half the mean magnitude and the largest magnitude; the mean itself
    is one more candidate, so that the result is never worse than QuantGPT's gamma = 1.
    """
    mean = mean_abs(folded)
    lowest, highest = mean / 2 / grid.edge, max_abs(folded) / grid.edge
    for points in (24, 64):
        ratio = (highest / torch.where(lowest == 0, 1, lowest)).clamp(min=1) ** (1 / (points - 1))
        candidates = torch.stack([lowest * ratio**i for i in range(points)])
        errors = torch.stack([_squared_error(folded, scale, grid) for scale in candidates])
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
        lowest, highest = best / ratio, best * ratio
    at_mean = mean / grid.edge
    better = _squared_error(folded, best, grid) < _squared_error(folded, at_mean, grid)
    return torch.where(better, best, at_mean)


def _squared_error(folded: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return (folded - fake_quantize(folded, scale, grid)).square().sum(1, keepdim=True)
