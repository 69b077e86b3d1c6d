"""Published weight quantizers, one a file, chosen by name."""

from pipeline.quant.quantizers.quantgpt import QuantGPT

QUANTIZERS = {"quantgpt": QuantGPT}

__all__ = ["QUANTIZERS", "QuantGPT"]
