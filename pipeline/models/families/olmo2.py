"""OLMo 2: what layers give is normed, not what they read; a norm of all heads' queries and of their keys."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "olmo2",
    Blocks(
        before_attention="",
        after_attention="post_attention_layernorm",
        before_mlp="",
        after_mlp="post_feedforward_layernorm",
        of_queries="self_attn.q_norm",
        of_keys="self_attn.k_norm",
    ),
    gguf=Gguf(architecture="olmo2", requires={"attention_bias": False}),
    compressed_tensors=r"model\.layers\..*",
)
