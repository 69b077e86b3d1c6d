"""OPT: learned positions after two rows of padding, ReLU. That of 350M projects its words and norms otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.models.blocks import Blocks
from pipeline.models.family import decoder_only

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuses(config: PreTrainedConfig) -> str:
    if config.word_embed_proj_dim != config.hidden_size:
        return "word_embed_proj_dim of another width than hidden_size"
    return "" if config.do_layer_norm_before and config.layer_norm_elementwise_affine else "norms of another kind"


FAMILY = decoder_only(
    "opt",
    Blocks(
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        first_position=2,
        last_norm="model.decoder.final_layer_norm",
        out="self_attn.out_proj",
        into_mlp=("fc1",),
        gated=False,
        out_of_mlp="fc2",
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        activation="activation_function",
        epsilon="",
        inner="ffn_dim",
        refuses=_refuses,
    ),
    linears=((r"model\.decoder\.project_(in|out)", True),),
)
