"""An encoder and a decoder as two ONNX graphs: an encoder that gives the keys and values of every cross-attention, and
a decoder. Both are drawn from what their family says of its two sides: see `pipeline.models.blocks.Sides`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from onnx import TensorProto
from transformers import PreTrainedConfig

from pipeline.models.blocks import Blocks, SideNumbers, Sides, numbers_of_side, ties_head
from pipeline.models.build import skeleton
from pipeline.models.family import families
from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import CONTRIB, Graph, check_activation


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of the decoder's own key-value cache."""
    numbers = numbers_of_side(config, _sides(config), "decoder")
    return KeyValueShape(numbers.layers, numbers.heads, numbers.head_size, numbers.longest)


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for an unknown activation."""
    check_activation(numbers_of_side(config, _sides(config), "decoder").activation)


def encoder(graph: Graph, config: PreTrainedConfig) -> None:
    """Draw the encoder: input_ids (1, source) to cross.N.key and .value (1, heads, source, head size)."""
    ids = graph.input("input_ids", TensorProto.INT64, [1, "source"])
    places = graph.op("Range", graph.number(0), graph.op("Size", ids), graph.number(1))
    side = _Side(graph, config, "encoder")
    blocks, numbers = side.blocks, side.numbers
    x = side.embedded(ids, places)
    distances = side.of_distances(places, places)
    for layer in range(numbers.layers):
        name = f"{blocks.layers}.{layer}"

        def attended(read: str, name: str = name) -> str:
            qkv = graph.linear(read, *(f"{name}.{part}" for part in blocks.qkv))
            q, k, v = graph.ops([f"{name}.{part}" for part in "qkv"], "Split", qkv, axis=-1, num_outputs=3)
            return graph.linear(side.attend(q, k, v, distances), f"{name}.{blocks.out}")

        x = side.added(x, f"{name}.{blocks.before_attention}", attended)
        x = side.inner(x, name)
    x = side.ended(x)
    cache, decodes = cache_of(config), _sides(config).decoder
    split = graph.vector(1, -1, cache.heads, cache.head_size)
    for layer in range(cache.layers):
        for part, module in zip(("key", "value"), decodes.cross[1:], strict=True):
            states = graph.linear(x, f"{decodes.layers}.{layer}.{module}")
            graph.op("Transpose", graph.op("Reshape", states, split), perm=[0, 2, 1, 3], named=f"cross.{layer}.{part}")
            graph.output(f"cross.{layer}.{part}", [1, cache.heads, "source", cache.head_size])


def decoder(graph: Graph, config: PreTrainedConfig, sliced: bool) -> None:
    """Draw the decoder, which takes what every decoder takes, and the encoder's cross.N.key and .value."""
    cache = cache_of(config)
    inputs = Decoder(graph, cache, sliced)
    for name in cache.names("cross"):
        graph.input(name, TensorProto.FLOAT, [1, cache.heads, "source", cache.head_size])
    side = _Side(graph, config, "decoder")
    blocks, numbers = side.blocks, side.numbers
    x = side.embedded(inputs.ids, inputs.positions)
    scale, distances = numbers.attention_scale, side.of_distances(inputs.positions, inputs.places)
    for layer in range(cache.layers):
        name = f"{blocks.layers}.{layer}"

        def attended(read: str, name: str = name, layer: int = layer) -> str:
            qkv = graph.linear(read, *(f"{name}.{part}" for part in blocks.qkv))
            mixed = inputs.attend((qkv,), layer, cache.heads, scale=scale, added=distances)
            return graph.linear(mixed, f"{name}.{blocks.out}")

        def looked_up(read: str, name: str = name, layer: int = layer) -> str:
            query = graph.linear(read, f"{name}.{blocks.cross[0]}")
            source = [f"cross.{layer}.{part}" for part in ("key", "value")]
            return graph.linear(side.attend(query, *source), f"{name}.{blocks.cross_out}")

        x = side.added(x, f"{name}.{blocks.before_attention}", attended)
        x = side.added(x, f"{name}.{blocks.before_cross}", looked_up)
        x = side.inner(x, name)
    head = _sides(config).table if ties_head(config) else "lm_head"
    inputs.finish(side.ended(x), head, config.vocab_size, "final_logits_bias", numbers.logit_divisor)


class _Side:
    """What encoder and decoder of a model share."""

    def __init__(self, graph: Graph, config: PreTrainedConfig, side: str) -> None:
        self._graph, self._config, self._sides, self._encodes = graph, config, _sides(config), side == "encoder"
        self.blocks: Blocks = getattr(self._sides, side)
        self.numbers: SideNumbers = numbers_of_side(config, self._sides, side)

    def embedded(self, ids: str, places: str) -> str:
        """Return the states of ids (1, length) at places (length,) that the first layer reads."""
        graph, blocks = self._graph, self.blocks
        words = graph.scale(graph.embed(ids, self._sides.table), self.numbers.embedding_scale)
        if not blocks.positions:
            return words
        first = self._config.pad_token_id + 1 if self._sides.computed_positions else blocks.first_position
        positions = self._positions(graph.op("Add", places, graph.number(first)) if first else places, first)
        if blocks.embedding_norm:
            return graph.add_and_norm(words, positions, blocks.embedding_norm, self.numbers.epsilon)[0]
        return graph.op("Add", words, positions)

    def _positions(self, places: str, first: int) -> str:
        module, graph = self.blocks.positions, self._graph
        if not self._sides.computed_positions:
            return graph.embed(places, module)
        rows = self.numbers.longest + first
        kind = skeleton(self._config).get_submodule(module)
        table = kind.get_embedding(rows, self._config.d_model, self._config.pad_token_id).float().numpy()
        return graph.op("Gather", graph.tensor(f"{module}.computed", np.ascontiguousarray(table)), places)

    def of_distances(self, queries: str, keys: str) -> str:
        """Return what the distance from queries at places (length,) to keys at places (total,) adds to their scores,
        (1, heads, length, total); "" in a family that adds nothing."""
        if not self.blocks.relative:
            return ""
        graph, config = self._graph, self._config
        module, furthest = f"{self.blocks.layers}.0.{self.blocks.relative}", int(config.relative_attention_max_distance)
        attention: Any = skeleton(config).get_submodule(module.rpartition(".")[0])
        buckets = int(config.relative_attention_num_buckets)
        sorted_into = attention._relative_position_bucket(  # those further away are all alike
            torch.arange(-furthest, furthest + 1), self._encodes, buckets, furthest
        )
        every = graph.tensor(f"{module}.buckets", np.arange(buckets))
        values = graph.op("Reshape", graph.embed(every, module), graph.vector(buckets, self.numbers.heads))
        table = graph.op("Gather", values, graph.tensor(f"{module}.sorted", sorted_into.numpy()))
        rows, columns = graph.op("Unsqueeze", queries, graph.vector(1)), graph.op("Unsqueeze", keys, graph.vector(0))
        distance = graph.op("Sub", columns, rows)
        near = graph.op("Clip", distance, graph.number(-furthest), graph.number(furthest))
        added = graph.op("Gather", table, graph.op("Add", near, graph.number(furthest)))  # (length, total, heads)
        return graph.op("Unsqueeze", graph.op("Transpose", added, perm=[2, 0, 1]), graph.vector(0))

    def attend(self, queries: str, keys: str, values: str, added: str = "") -> str:
        """Draw attention to all keys; `added` (1, heads, length, total) is added to scores."""
        more = ["", "", added] if added else []  # no bias, no mask
        kernel: dict[str, Any] = {"num_heads": self.numbers.heads, "scale": self.numbers.attention_scale}
        return self._graph.op("MultiHeadAttention", queries, keys, values, *more, domain=CONTRIB, **kernel)

    def added(self, x: str, norm: str, part: Callable[[str], str]) -> str:
        """Return x with what a part of a layer makes of it, normed before the part or after."""
        if self._sides.norm_first:
            return self._graph.op("Add", part(self._graph.norm(x, norm, self.numbers.epsilon)), x)
        return self._graph.add_and_norm(part(x), x, norm, self.numbers.epsilon)[0]

    def inner(self, x: str, name: str) -> str:
        """Return x with what the MLP of the layer `name` makes of it."""
        return self.added(x, f"{name}.{self.blocks.before_mlp}", lambda read: self._mlp(read, name))

    def _mlp(self, x: str, name: str) -> str:
        graph, blocks, numbers = self._graph, self.blocks, self.numbers
        into = blocks.into_mlp if numbers.gated or not blocks.ungated else (blocks.ungated,)
        inner = graph.linear(x, *(f"{name}.{part}" for part in into))
        if not numbers.gated:
            return graph.linear(graph.activate(inner, numbers.activation), f"{name}.{blocks.out_of_mlp}")
        gate, up = graph.ops([f"{name}.gate", f"{name}.up"], "Split", inner, axis=-1, num_outputs=2)
        product = graph.op("Mul", graph.activate(gate, numbers.activation), up)
        return graph.linear(product, f"{name}.{blocks.out_of_mlp}")

    def ended(self, x: str) -> str:
        """Return what comes out after the last layer."""
        return self._graph.norm(x, self.blocks.last_norm, self.numbers.epsilon) if self._sides.norm_first else x


def _sides(config: PreTrainedConfig) -> Sides:
    return cast(Sides, families()[config.model_type].sides)  # which each has that is drawn here
