"""Stretched elastic quantization (ParetoQ, Liu et al. 2025)."""

from pipeline.quant.quantizers.lsq import LSQ


class SEQ(LSQ):
    """2^b levels around zero and none at zero: (clip(round(w / s - 0.5)) + 0.5) s with a learned step s.

    The published straight-through gradient is the wide one.
    """

    published_ste = "wide"
