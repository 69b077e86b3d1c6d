"""The packed model on a CPU, by ONNX Runtime: weights stay packed, activations are 8 bits, products whole numbers."""

from pipeline.runtime.runtime import Runtime

__all__ = ["Runtime"]
