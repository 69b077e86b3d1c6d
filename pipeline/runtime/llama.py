"""Llama as an ONNX graph."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.errors import ConfigError
from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import Graph, check_activation

LONGEST = 4096  # rows of the rotary table, which lies in memory: 1 MiB at a head size of 64
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # the others change with the length of the text


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of the key-value cache."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = min(LONGEST, config.max_position_embeddings)
    return KeyValueShape(config.num_hidden_layers, config.num_key_value_heads, head_size, longest)


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for rotary angles that depend on the text, or an unknown activation."""
    check_activation(config.hidden_act)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in FIXED_ROTARY:
        raise ConfigError(f"model: rope_type {kind!r} has no fixed table; valid: {', '.join(FIXED_ROTARY)}")


def decoder(graph: Graph, config: PreTrainedConfig, sliced: bool) -> None:
    """Draw the whole model, for texts of up to LONGEST tokens."""
    inputs, epsilon = Decoder(graph, cache_of(config), sliced), config.rms_norm_eps
    rotary = _rotary(graph, config, inputs.cache)
    total = graph.embed(inputs.ids, "model.embed_tokens")
    first = graph.rest("model.layers.0.input_layernorm.weight")
    x = graph.op("SimplifiedLayerNormalization", total, first, epsilon=epsilon)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        qkv = graph.linear(x, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        mixed = inputs.attend(qkv, layer, config.num_attention_heads, rotary)
        back = graph.linear(mixed, f"{name}.self_attn.o_proj")
        x, total = graph.add_and_norm(back, total, f"{name}.post_attention_layernorm", epsilon)
        both = graph.linear(x, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        gate, up = graph.ops([f"{name}.gate", f"{name}.up"], "Split", both, axis=-1, num_outputs=2)
        inner = graph.op("Mul", graph.activate(gate, config.hidden_act), up)
        following = f"model.layers.{layer + 1}.input_layernorm" if layer + 1 < inputs.cache.layers else "model.norm"
        x, total = graph.add_and_norm(graph.linear(inner, f"{name}.mlp.down_proj"), total, following, epsilon)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    inputs.finish(x, head, config.vocab_size)


def _rotary(graph: Graph, config: PreTrainedConfig, cache: KeyValueShape) -> tuple[str, str]:
    """Return tables (longest, head size / 2) of cosines and sines."""
    with torch.no_grad():
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(cache.longest)[None])
    cosines, sines = (np.ascontiguousarray(table[0, :, : cache.head_size // 2].numpy()) for table in (cos, sin))
    return graph.tensor("rotary.cos", cosines), graph.tensor("rotary.sin", sines)
