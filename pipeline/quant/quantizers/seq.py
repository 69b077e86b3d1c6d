"""Stretched elastic quantization (ParetoQ, Liu et al. 2025)."""

from torch import Tensor

from pipeline.quant.quantizers.lsq import LSQ
from pipeline.quant.quantizers.step import max_abs


class SEQ(LSQ):
    """2^b levels around zero and none at zero: (clip(round(w / s - 0.5)) + 0.5) s with a learned step s.

    At its start the 2^b steps span all weights: 2^(b-1) s = max |w|. The published straight-through gradient is the
    wide one.
    """

    published_ste = "wide"

    def published_start(self, weight: Tensor) -> Tensor:
        return max_abs(weight, self.granularity) / -self.grid.low
