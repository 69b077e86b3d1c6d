"""Gemma 3's text model: Gemma 2 with norms of each head in place of caps; its windowed layers have their own angles."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "gemma3_text",
    Blocks(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        of_queries="self_attn.q_norm",
        of_keys="self_attn.k_norm",
        norm_offset=1.0,
        scaled_embedding=True,
        activation="hidden_activation",
    ),
    gguf=Gguf(
        architecture="gemma3",
        activations=("gelu_pytorch_tanh",),
        window_every=6,
        angles_in_window=10000.0,
        scales_angles=("linear",),
        largest=62,
        requires={"attention_bias": False},
    ),
    compressed_tensors=r"model\.layers\..*",
)
