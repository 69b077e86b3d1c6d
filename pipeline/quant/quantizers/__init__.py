"""Published weight quantizers, one a file, chosen by name."""

from pipeline.quant.quantizers.base import WeightQuantizer
from pipeline.quant.quantizers.laq import LAQ, UniformLAQ
from pipeline.quant.quantizers.lsq import LSQ, SymmetricLSQ
from pipeline.quant.quantizers.pact import PACT
from pipeline.quant.quantizers.quantgpt import QuantGPT
from pipeline.quant.quantizers.seq import SEQ
from pipeline.quant.quantizers.statistics import Statistics
from pipeline.quant.quantizers.twn import TWN
from pipeline.quant.spec import QuantizerName

QUANTIZERS: dict[QuantizerName, type[WeightQuantizer]] = {
    "quantgpt": QuantGPT,
    "pact": PACT,
    "lsq": LSQ,
    "lsq_symmetric": SymmetricLSQ,
    "laq": LAQ,
    "laq_uniform": UniformLAQ,
    "twn": TWN,
    "statistics": Statistics,
    "seq": SEQ,
}

__all__ = ["QUANTIZERS", "WeightQuantizer"]
