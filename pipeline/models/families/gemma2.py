"""Gemma 2: norms before and after, times 1 + w; caps of scores and logits, a window in every other layer."""

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

FAMILY = decoder_only(
    "gemma2",
    Blocks(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        norm_offset=1.0,
        scaled_embedding=True,
        activation="hidden_activation",
        capped_attention=True,
    ),
    gguf=Gguf(
        architecture="gemma2",
        activations=("gelu_pytorch_tanh",),
        window_every=2,
        capped=True,
        largest=46,
        requires={"attention_bias": False},
    ),
    compressed_tensors=r"model\.layers\..*",
)
