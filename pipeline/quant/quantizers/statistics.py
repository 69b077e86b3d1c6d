"""Statistics-based ternary weights (TBT, Liu et al., ACL 2023): the grid follows from the weights' own mean and spread.

Recalled, not seen: with mu the mean of the weights, alpha = 4/3 mean |w - mu| and codes round(clip((w - mu) / alpha,
-1, 1)). The mean is not added back, so that codes and one scale are all that ships.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quant.quantizers.base import WeightQuantizer, mean_abs

SPREAD = 4 / 3


class Statistics(WeightQuantizer):
    """Nothing is learned; mean and spread are constants for the gradient."""

    def centred(self, folded: Tensor) -> Tensor:
        """Return the weight less the mean of each row."""
        return folded - folded.detach().mean(1, keepdim=True)

    def scale_of(self, folded: Tensor) -> Tensor:
        """Return the scale of a weight that is already centred."""
        return SPREAD * mean_abs(folded)

    def distance(self, folded: Tensor) -> Tensor:
        return self.scale_of(self.centred(folded))

    def fake_quantize(self, folded: Tensor) -> Tensor:
        return super().fake_quantize(self.centred(folded))

    def quantize(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        return super().quantize(self.centred(folded))
