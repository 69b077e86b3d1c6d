"""T5 and Flan-T5: relative positions alone, scores that nothing divides, RMS norms; from version 1.1 on a gate, and a
head of its own."""

from __future__ import annotations

from typing import Any

from pipeline.models.blocks import Blocks, Sides
from pipeline.models.family import encoder_decoder


def _attention(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}" for part in "qkv")


def _side(named: str, mlp: str, **more: Any) -> Blocks:
    """Return one side, whose MLP is a part of this number."""
    return Blocks(
        layers=f"{named}.block",
        embedding=f"{named}.embed_tokens",
        relative="layer.0.SelfAttention.relative_attention_bias",
        last_norm=f"{named}.final_layer_norm",
        qkv=_attention("layer.0.SelfAttention"),
        out="layer.0.SelfAttention.o",
        into_mlp=(f"{mlp}.DenseReluDense.wi_0", f"{mlp}.DenseReluDense.wi_1"),
        ungated=f"{mlp}.DenseReluDense.wi",
        out_of_mlp=f"{mlp}.DenseReluDense.wo",
        before_attention="layer.0.layer_norm",
        before_mlp=f"{mlp}.layer_norm",
        activation="dense_act_fn",
        epsilon="layer_norm_epsilon",
        **more,
    )


FAMILY = encoder_decoder(
    "t5",
    Sides(
        encoder=_side("encoder", "layer.1"),
        decoder=_side(
            "decoder",
            "layer.2",
            cross=_attention("layer.1.EncDecAttention"),
            cross_out="layer.1.EncDecAttention.o",
            before_cross="layer.1.layer_norm",
        ),
        table="shared",
        norm_first=True,
        divided_scores=False,
    ),
)
