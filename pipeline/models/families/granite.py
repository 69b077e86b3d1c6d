"""Granite: Llama with numbers that multiply embedding, attention scores, what layers add, and logits."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "granite",
    Blocks(),
    gguf=Gguf(architecture="granite", side_by_side=True, scaled=True, requires={"mlp_bias": False}),
    compressed_tensors=r"model\.layers\..*",
)
