"""Module-wise dynamic scaling (Tao et al. 2022, section 3.3): learn gamma in alpha = gamma * mean |w|.

The clipping factor follows the weights as they move; only its ratio to their mean magnitude is learned.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.quant.grid import fake_quantize, quantize, step_size
from pipeline.quant.spec import Granularity, Ste

SMALLEST_GAMMA = 1e-3


class QuantGPT(nn.Module):
    """Quantizes one matrix (rows, columns); gamma is (1, 1) per tensor or (rows, 1) per row."""

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        granularity: Granularity = "tensor",
        gamma_init: Literal["one", "mse"] = "one",
        ste: Ste = "clipped",
    ) -> None:
        super().__init__()
        self.bits, self.granularity, self.ste = bits, granularity, ste
        shape = (weight.shape[0], 1) if granularity == "row" else (1, 1)
        self.gamma = nn.Parameter(torch.ones(shape, dtype=weight.dtype, device=weight.device))
        if gamma_init == "mse":
            self.gamma.data = mse_gamma(weight.detach(), mean_abs(weight, granularity), bits)

    def alpha(self, weight: Tensor) -> Tensor:
        """The clipping factor; mean |w| is recomputed at each call and is a constant for the gradient."""
        return self.gamma * mean_abs(weight, self.granularity)

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.alpha(weight), self.bits, self.ste)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int8, in the weight's shape, and their step size in the shape of gamma."""
        alpha = self.alpha(weight)
        return quantize(weight, alpha, self.bits), step_size(alpha, self.bits)

    @torch.no_grad()
    def project_(self) -> None:
        """After an optimizer step: a clipping factor stays positive."""
        self.gamma.clamp_(min=SMALLEST_GAMMA)


def mean_abs(weight: Tensor, granularity: Granularity) -> Tensor:
    """||w||_1 / numel of the matrix (1, 1) or of each row (rows, 1), detached."""
    magnitude = weight.detach().abs()
    return magnitude.mean(1, keepdim=True) if granularity == "row" else magnitude.mean().reshape(1, 1)


@torch.no_grad()
def mse_gamma(weight: Tensor, mean: Tensor, bits: int) -> Tensor:
    """The gamma that minimises ||w - w_q||^2, by a coarse and a fine search, in the shape of `mean`.

    The search runs over alpha between half the mean magnitude and the largest magnitude.
    """
    largest = weight.abs().amax(1, keepdim=True) if mean.shape[0] > 1 else weight.abs().max().reshape(1, 1)
    highest = (largest / torch.where(mean == 0, torch.ones_like(mean), mean)).clamp(min=1.0)
    lowest = torch.full_like(mean, 0.5)
    for points in (24, 64):
        ratio = (highest / lowest) ** (1 / (points - 1))
        candidates = torch.stack([lowest * ratio**i for i in range(points)])
        errors = torch.stack([_squared_error(weight, gamma * mean, bits) for gamma in candidates])
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
        lowest, highest = best / ratio, best * ratio
    one = torch.ones_like(mean)
    better = _squared_error(weight, best * mean, bits) < _squared_error(weight, mean, bits)
    return torch.where(better, best, one)


def _squared_error(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    error = (weight - fake_quantize(weight, alpha, bits)).square()
    return error.sum(1, keepdim=True) if alpha.shape[0] > 1 else error.sum().reshape(1, 1)
