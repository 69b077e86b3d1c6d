"""Qwen 3: Llama with a norm of each head's queries and keys."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "qwen3",
    Blocks(of_queries="self_attn.q_norm", of_keys="self_attn.k_norm"),
    gguf=Gguf(architecture="qwen3", requires={"attention_bias": False}),
    compressed_tensors=r"model\.layers\..*",
)
