"""Stretched elastic quantization (ParetoQ, Liu et al. 2025)."""

from torch import Tensor

from pipeline.quant.quantizers.base import max_abs
from pipeline.quant.quantizers.lsq import LSQ


class SEQ(LSQ):
    """2^b levels around zero and none at zero: (clip(round(w / s - 0.5)) + 0.5) s with a learned scale s.

    At its start 2^b times the scale spans all weights: 2^(b-1) s = max |w|. The published straight-through gradient is
    the wide one.
    """

    published_ste = "wide"

    def published_start(self, folded: Tensor) -> Tensor:
        return max_abs(folded) / -self.grid.low
