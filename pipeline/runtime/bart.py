"""BART as two ONNX graphs: an encoder that gives the keys and values of every cross-attention, and a decoder."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto
from transformers import PreTrainedConfig

from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import CONTRIB, Graph, check_activation

POSITION_OFFSET = 2  # BART's own: the first two rows of its position table are not used
EPSILON = 1e-5


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of the decoder's own key-value cache."""
    heads = config.decoder_attention_heads
    return KeyValueShape(config.decoder_layers, heads, config.d_model // heads, config.max_position_embeddings)


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for an unknown activation."""
    check_activation(config.activation_function)


def encoder(graph: Graph, config: PreTrainedConfig) -> None:
    """Draw the encoder: input_ids (1, source) to cross.N.key and .value (1, heads, source, head size)."""
    ids = graph.input("input_ids", TensorProto.INT64, [1, "source"])
    places = graph.op("Range", graph.number(0), graph.op("Size", ids), graph.number(1))
    x = _embedded(graph, config, "model.encoder", ids, places)
    for layer in range(config.encoder_layers):
        name = f"model.encoder.layers.{layer}"
        qkv = graph.linear(x, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        q, k, v = graph.ops([f"{name}.{part}" for part in "qkv"], "Split", qkv, axis=-1, num_outputs=3)
        mixed = graph.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=config.encoder_attention_heads)
        back = graph.linear(mixed, f"{name}.self_attn.out_proj")
        x, _ = graph.add_and_norm(back, x, f"{name}.self_attn_layer_norm", EPSILON)
        x = _inner(graph, config, name, x)
    cache = cache_of(config)
    split = graph.vector(1, -1, cache.heads, cache.head_size)
    for layer in range(cache.layers):
        for part, short in (("key", "k"), ("value", "v")):
            states = graph.linear(x, f"model.decoder.layers.{layer}.encoder_attn.{short}_proj")
            graph.op("Transpose", graph.op("Reshape", states, split), perm=[0, 2, 1, 3], named=f"cross.{layer}.{part}")
            graph.output(f"cross.{layer}.{part}", [1, cache.heads, "source", cache.head_size])


def decoder(graph: Graph, config: PreTrainedConfig, sliced: bool) -> None:
    """Draw the decoder, which takes what every decoder takes, and the encoder's cross.N.key and .value."""
    cache = cache_of(config)
    inputs = Decoder(graph, cache, sliced)
    for name in cache.names("cross"):
        graph.input(name, TensorProto.FLOAT, [1, cache.heads, "source", cache.head_size])
    x = _embedded(graph, config, "model.decoder", inputs.ids, inputs.positions)
    for layer in range(cache.layers):
        name = f"model.decoder.layers.{layer}"
        qkv = graph.linear(x, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        back = graph.linear(inputs.attend(qkv, layer, cache.heads), f"{name}.self_attn.out_proj")
        x, _ = graph.add_and_norm(back, x, f"{name}.self_attn_layer_norm", EPSILON)
        query = graph.linear(x, f"{name}.encoder_attn.q_proj")
        source = [f"cross.{layer}.{part}" for part in ("key", "value")]
        mixed = graph.op("MultiHeadAttention", query, *source, domain=CONTRIB, num_heads=cache.heads)
        back = graph.linear(mixed, f"{name}.encoder_attn.out_proj")
        x, _ = graph.add_and_norm(back, x, f"{name}.encoder_attn_layer_norm", EPSILON)
        x = _inner(graph, config, name, x)
    inputs.finish(x, "model.shared", config.vocab_size, "final_logits_bias")


def _embedded(graph: Graph, config: PreTrainedConfig, side: str, ids: str, places: str) -> str:
    words = graph.embed(ids, "model.shared")
    if config.scale_embedding:
        words = graph.op("Mul", words, graph.tensor("embed_scale", np.array(math.sqrt(config.d_model), np.float32)))
    positions = graph.embed(graph.op("Add", places, graph.number(POSITION_OFFSET)), f"{side}.embed_positions")
    return graph.add_and_norm(words, positions, f"{side}.layernorm_embedding", EPSILON)[0]


def _inner(graph: Graph, config: PreTrainedConfig, name: str, x: str) -> str:
    inner = graph.activate(graph.linear(x, f"{name}.fc1"), config.activation_function)
    return graph.add_and_norm(graph.linear(inner, f"{name}.fc2"), x, f"{name}.final_layer_norm", EPSILON)[0]
