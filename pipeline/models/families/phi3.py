"""Phi 3 and 4: Llama with one matrix for queries, keys and values, and one for gate and up."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "phi3",
    Blocks(qkv=("self_attn.qkv_proj",), into_mlp=("mlp.gate_up_proj",)),
    gguf=Gguf(architecture="phi3", scales_angles=("longrope",)),
    compressed_tensors=r"model\.layers\..*",
)
