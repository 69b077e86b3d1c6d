"""Mistral: Llama, with a sliding window in its first versions."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "mistral",
    Blocks(),
    gguf=Gguf(architecture="llama", side_by_side=True, divides_angles=True),
    compressed_tensors=r"model\.layers\..*",
)
