"""Llama, whose parts most families have, and whose names they use."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "llama",
    Blocks(),
    gguf=Gguf(architecture="llama", side_by_side=True, divides_angles=True, requires={"mlp_bias": False}),
    compressed_tensors=r"model\.layers\..*",
)
