"""An encoder and a decoder of BART's kind as two ONNX graphs: an encoder that gives the keys and values of every
cross-attention, and a decoder. What differs from family to family is told by `pipeline.models.blocks.Sides`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto
from transformers import PreTrainedConfig

from pipeline.models.blocks import Sides
from pipeline.models.build import skeleton
from pipeline.models.family import families
from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import CONTRIB, Graph, check_activation

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
    side = _Side(graph, config, "model.encoder")
    x = side.embedded(ids, places)
    for layer in range(config.encoder_layers):
        name = f"model.encoder.layers.{layer}"

        def attended(read: str, name: str = name) -> str:
            qkv = graph.linear(read, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
            q, k, v = graph.ops([f"{name}.{part}" for part in "qkv"], "Split", qkv, axis=-1, num_outputs=3)
            mixed = graph.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=config.encoder_attention_heads)
            return graph.linear(mixed, f"{name}.self_attn.out_proj")

        x = side.added(x, f"{name}.self_attn_layer_norm", attended)
        x = side.inner(x, name)
    x = side.ended(x)
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
    side = _Side(graph, config, "model.decoder")
    x = side.embedded(inputs.ids, inputs.positions)
    for layer in range(cache.layers):
        name = f"model.decoder.layers.{layer}"

        def attended(read: str, name: str = name, layer: int = layer) -> str:
            qkv = graph.linear(read, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
            return graph.linear(inputs.attend((qkv,), layer, cache.heads), f"{name}.self_attn.out_proj")

        def looked_up(read: str, name: str = name, layer: int = layer) -> str:
            query = graph.linear(read, f"{name}.encoder_attn.q_proj")
            source = [f"cross.{layer}.{part}" for part in ("key", "value")]
            mixed = graph.op("MultiHeadAttention", query, *source, domain=CONTRIB, num_heads=cache.heads)
            return graph.linear(mixed, f"{name}.encoder_attn.out_proj")

        x = side.added(x, f"{name}.self_attn_layer_norm", attended)
        x = side.added(x, f"{name}.encoder_attn_layer_norm", looked_up)
        x = side.inner(x, name)
    inputs.finish(side.ended(x), "model.shared", config.vocab_size, "final_logits_bias")


class _Side:
    """What encoder and decoder of a model share."""

    def __init__(self, graph: Graph, config: PreTrainedConfig, name: str) -> None:
        self._graph, self._config, self._name = graph, config, name
        self._sides = families()[config.model_type].sides or Sides()

    def embedded(self, ids: str, places: str) -> str:
        """Return the states of ids (1, length) at places (length,) that the first layer reads."""
        graph, config, sides = self._graph, self._config, self._sides
        words = graph.embed(ids, "model.shared")
        if config.scale_embedding:
            words = graph.scale(words, math.sqrt(config.d_model))
        first = config.pad_token_id + 1 if sides.computed_positions else sides.first_position
        places = graph.op("Add", places, graph.number(first)) if first else places
        positions = self._positions(places, first)
        if sides.normed_embedding:
            return graph.add_and_norm(words, positions, f"{self._name}.layernorm_embedding", EPSILON)[0]
        return graph.op("Add", words, positions)

    def _positions(self, places: str, first: int) -> str:
        module, graph = f"{self._name}.embed_positions", self._graph
        if not self._sides.computed_positions:
            return graph.embed(places, module)
        rows = self._config.max_position_embeddings + first
        kind = skeleton(self._config).get_submodule(module)
        table = kind.get_embedding(rows, self._config.d_model, self._config.pad_token_id).float().numpy()
        return graph.op("Gather", graph.tensor(f"{module}.computed", np.ascontiguousarray(table)), places)

    def added(self, x: str, norm: str, part: Callable[[str], str]) -> str:
        """Return x with what a part of a layer makes of it, normed before the part or after."""
        if self._sides.norm_first:
            return self._graph.op("Add", part(self._graph.norm(x, norm, EPSILON)), x)
        return self._graph.add_and_norm(part(x), x, norm, EPSILON)[0]

    def inner(self, x: str, name: str) -> str:
        """Return x with what the MLP of the layer `name` makes of it."""
        graph = self._graph

        def inner(read: str) -> str:
            return graph.linear(
                graph.activate(graph.linear(read, f"{name}.fc1"), self._config.activation_function), f"{name}.fc2"
            )

        return self.added(x, f"{name}.final_layer_norm", inner)

    def ended(self, x: str) -> str:
        """Return what comes out after the last layer."""
        return self._graph.norm(x, f"{self._name}.layer_norm", EPSILON) if self._sides.norm_first else x
