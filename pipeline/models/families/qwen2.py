"""Qwen 2 and 2.5: Llama with biases of queries, keys and values."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "qwen2",
    Blocks(),
    gguf=Gguf(architecture="qwen2"),
    compressed_tensors=r"model\.layers\..*",
)
