"""GPT-2: learned positions, LayerNorm, and linears that are Conv1D."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.models.blocks import Blocks
from pipeline.models.family import Gguf, decoder_only

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuses(config: PreTrainedConfig) -> str:
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    return "" if plain else "another attention scale than 1/sqrt(head size)"


FAMILY = decoder_only(
    "gpt2",
    Blocks(
        layers="transformer.h",
        embedding="transformer.wte",
        positions="transformer.wpe",
        last_norm="transformer.ln_f",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        into_mlp=("mlp.c_fc",),
        gated=False,
        out_of_mlp="mlp.c_proj",
        before_attention="ln_1",
        before_mlp="ln_2",
        activation="activation_function",
        epsilon="layer_norm_epsilon",
        inner="n_inner",
        refuses=_refuses,
    ),
    gguf=Gguf(
        architecture="gpt2",
        activations=("gelu_new",),
        requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
)
