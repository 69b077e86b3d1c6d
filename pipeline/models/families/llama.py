"""Llama: every linear is symmetric, down_proj included, since SiLU times up has both signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.models.family import Family, Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "feed_forward_length": config.intermediate_size,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _refuses(config: PreTrainedConfig) -> str:
    kind = config.rope_parameters.get("rope_type", "default")
    return "" if kind == "default" else f"takes plain rotary positions, not rope_type {kind!r}"


FAMILY = Family(
    name="llama",
    linears=(
        (r"model\.layers\.\d+\.self_attn\.[qkvo]_proj", True),
        (r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj", True),
    ),
    embedding="model.embed_tokens",
    graph="llama",
    gguf=Gguf(
        architecture="llama",
        names={
            r"model\.embed_tokens": "token_embd",
            r"model\.norm": "output_norm",
            r"model\.layers\.(\d+)\.input_layernorm": "blk.{}.attn_norm",
            r"model\.layers\.(\d+)\.self_attn\.q_proj": "blk.{}.attn_q",
            r"model\.layers\.(\d+)\.self_attn\.k_proj": "blk.{}.attn_k",
            r"model\.layers\.(\d+)\.self_attn\.v_proj": "blk.{}.attn_v",
            r"model\.layers\.(\d+)\.self_attn\.o_proj": "blk.{}.attn_output",
            r"model\.layers\.(\d+)\.post_attention_layernorm": "blk.{}.ffn_norm",
            r"model\.layers\.(\d+)\.mlp\.gate_proj": "blk.{}.ffn_gate",
            r"model\.layers\.(\d+)\.mlp\.up_proj": "blk.{}.ffn_up",
            r"model\.layers\.(\d+)\.mlp\.down_proj": "blk.{}.ffn_down",
            r"lm_head": "output",
        },
        settings=_settings,
        requires={"hidden_act": "silu", "mlp_bias": False},
        rotary={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        refuses=_refuses,
    ),
    compressed_tensors=r"model\.layers\..*",
)
