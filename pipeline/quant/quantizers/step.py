"""What quantizers share: a matrix on a grid with one step, per tensor or per row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, quantize
from pipeline.quant.spec import Granularity, Grid, QuantSpec, Ste, grid, levels_of

SMALLEST_GAMMA = 1e-3  # a learned ratio stays positive, and with it the step
REACH = {"clipped": 0.0, "wide": 0.5, "identity": math.inf}


class StepQuantizer(nn.Module, ABC):
    """Quantizes one matrix (rows, columns) by a step of shape (1, 1), or (rows, 1) per row.

    Subclasses say what the step is. Everything that `freeze` depends on is the weight or a parameter of the
    quantizer (without gradient if it is computed rather than learned), so that checkpoints hold it.
    """

    published_ste: ClassVar[Ste] = "clipped"

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, spec: QuantSpec) -> None:
        super().__init__()
        self.bits, self.granularity = bits, granularity
        self.grid = grid(levels_of(spec.quantizer), bits)
        self.reach = REACH[self.published_ste if spec.ste == "auto" else spec.ste]
        self.share = 1.0  # of the quantized weight in a training pass: see `on_grid`

    @abstractmethod
    def step(self, weight: Tensor) -> Tensor:
        """The distance between two levels for this weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.step(weight), self.grid, self.reach)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int8, in the weight's shape, and the step that ships beside them."""
        step = self.step(weight)
        return quantize(weight, step, self.grid), step.detach().clone()

    def after_step(self, weight: Tensor, second_moment: Tensor | None) -> None:
        """Called after each optimizer step with the weight's second moment in Adam, if it has one."""


def mean_abs(weight: Tensor, granularity: Granularity) -> Tensor:
    """||w||_1 / numel of the matrix (1, 1) or of each row (rows, 1), detached."""
    return reduce_mean(weight.detach().abs(), granularity)


def max_abs(weight: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude of the matrix (1, 1) or of each row (rows, 1), detached."""
    magnitude = weight.detach().abs()
    return magnitude.amax(1, keepdim=True) if granularity == "row" else magnitude.max().reshape(1, 1)


def reduce_mean(values: Tensor, granularity: Granularity) -> Tensor:
    """The mean of the matrix (1, 1) or of each row (rows, 1)."""
    return values.mean(1, keepdim=True) if granularity == "row" else values.mean().reshape(1, 1)


@torch.no_grad()
def least_error_step(weight: Tensor, grid: Grid, granularity: Granularity) -> Tensor:
    """The step that minimises ||w - w_q||^2, by a coarse and a fine search; 0 for weights that are all zero.

    The search runs over outermost levels between half the mean magnitude and the largest magnitude; the mean itself
    is one more candidate, so that the result is never worse than QuantGPT's gamma = 1.
    """
    mean = mean_abs(weight, granularity)
    lowest, highest = mean / 2 / grid.edge, max_abs(weight, granularity) / grid.edge
    for points in (24, 64):
        ratio = (highest / torch.where(lowest == 0, 1, lowest)).clamp(min=1) ** (1 / (points - 1))
        candidates = torch.stack([lowest * ratio**i for i in range(points)])
        errors = torch.stack([_squared_error(weight, step, grid) for step in candidates])
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
        lowest, highest = best / ratio, best * ratio
    at_mean = mean / grid.edge
    better = _squared_error(weight, best, grid) < _squared_error(weight, at_mean, grid)
    return torch.where(better, best, at_mean)


def _squared_error(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    error = (weight - fake_quantize(weight, step, grid)).square()
    return error.sum(1, keepdim=True) if step.shape[0] > 1 else error.sum().reshape(1, 1)
