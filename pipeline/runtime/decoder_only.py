"""A decoder alone as an ONNX graph, drawn from what its family says of its layers: see `pipeline.models.blocks`."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.models.blocks import Blocks, Numbers, angles_change_at, numbers_of, rope_types
from pipeline.models.build import skeleton
from pipeline.models.family import families
from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import Graph, check_activation

LONGEST = 4096  # rows of the rotary table, which lies in memory: 1 MiB at a head size of 64
ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of the key-value cache."""
    blocks, numbers = _described(config)
    longest: int = config.max_position_embeddings
    if not blocks.positions:  # angles of a kind that depends on the text are up to there what they are of a short one
        longest = min(longest, LONGEST, angles_change_at(config) or LONGEST)
    return KeyValueShape(numbers.layers, numbers.kv_heads, numbers.head_size, longest)


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for rotary angles of an unknown kind, an unknown activation, or what else of a configuration
    the family's layers are not drawn with."""
    blocks, numbers = _described(config)
    check_activation(numbers.activation)
    unknown = sorted(rope_types(config) - {*ROTARY})
    if unknown:
        raise ConfigError(f"model: rope_type {unknown[0]!r} has no table; valid: {', '.join(ROTARY)}")
    reason = blocks.refuses(config)
    if reason:
        raise ConfigError(
            f"model: {config.model_type} with {reason} has no graph for ONNX Runtime. It runs in torch, by pipeline."
            "load and in transformers, and --format transformers takes it."
        )


def decoder(graph: Graph, config: PreTrainedConfig, sliced: bool) -> None:
    """Draw the whole model, for texts of up to `cache_of(config).longest` tokens."""
    blocks, numbers = _described(config)
    inputs = Decoder(graph, cache_of(config), sliced)
    rotary = {kind: _rotary(graph, config, inputs.cache, kind) for kind in {*numbers.rotary} if kind is not None}
    stream = _embedded(graph, inputs, blocks, numbers)
    for layer in range(numbers.layers):
        name = f"{blocks.layers}.{layer}"
        read = stream.normed(name, blocks.before_attention)
        qkv = _queries_keys_values(graph, inputs, blocks, numbers, layer, read)
        kind = numbers.rotary[layer]
        turned = None if kind is None else rotary[kind]
        scores = (numbers.attention_scale, numbers.attention_cap)
        mixed = inputs.attend(qkv, layer, numbers.heads, turned, numbers.windows[layer], *scores)
        back = stream.norm(graph.linear(mixed, f"{name}.{blocks.out}"), name, blocks.after_attention)
        if numbers.parallel:
            read = stream.normed(name, blocks.before_mlp)
            stream.add(back)
        else:
            stream.add(back)
            read = stream.normed(name, blocks.before_mlp)
        stream.add(stream.norm(_inner(graph, blocks, numbers, name, read), name, blocks.after_mlp))
    head = blocks.embedding if config.tie_word_embeddings else "lm_head"
    states = stream.normed("", blocks.last_norm)
    inputs.finish(states, head, config.vocab_size, divisor=numbers.logit_divisor, cap=numbers.logit_cap)


class _Stream:
    """The states that layers read, and add to. What was added last is added by the kernel that norms the sum."""

    def __init__(self, graph: Graph, states: str, added: str | None, blocks: Blocks, numbers: Numbers) -> None:
        self._graph, self._states, self._added = graph, states, added
        self._offset, self._epsilon, self._scale = blocks.norm_offset, numbers.epsilon, numbers.residual_scale

    def add(self, x: str) -> None:
        """Add x (1, length, hidden) to the states."""
        self._states, self._added = self._sum(), x if self._scale == 1.0 else self._graph.scale(x, self._scale)

    def normed(self, layer: str, norm: str) -> str:
        """Return the states as a norm of a layer gives them; as they are where that is empty."""
        if not norm or self._added is None:
            self._states, self._added = self._sum(), None
            return self.norm(self._states, layer, norm)
        module = f"{layer}.{norm}".lstrip(".")
        result, self._states = self._graph.add_and_norm(self._added, self._states, module, self._epsilon, self._offset)
        self._added = None
        return result

    def norm(self, x: str, layer: str, norm: str) -> str:
        """Return what a norm of a layer makes of x, which is x where there is none."""
        return self._graph.norm(x, f"{layer}.{norm}".lstrip("."), self._epsilon, self._offset) if norm else x

    def _sum(self) -> str:
        return self._states if self._added is None else self._graph.op("Add", self._added, self._states)


def _embedded(graph: Graph, inputs: Decoder, blocks: Blocks, numbers: Numbers) -> _Stream:
    words = graph.scale(graph.embed(inputs.ids, blocks.embedding), numbers.embedding_scale)
    if not blocks.positions:
        return _Stream(graph, words, None, blocks, numbers)
    places = inputs.positions
    if blocks.first_position:
        places = graph.op("Add", places, graph.number(blocks.first_position))
    return _Stream(graph, graph.embed(places, blocks.positions), words, blocks, numbers)


def _queries_keys_values(
    graph: Graph, inputs: Decoder, blocks: Blocks, numbers: Numbers, layer: int, x: str
) -> tuple[str, ...]:
    """Return queries, keys and values side by side in one tensor, or apart in three."""
    name = f"{blocks.layers}.{layer}"
    qkv = graph.linear(x, *(f"{name}.{part}" for part in blocks.qkv))
    if blocks.by_head:
        apart = graph.op("Reshape", qkv, graph.vector(1, -1, numbers.heads, 3, numbers.head_size))
        together = graph.op("Transpose", apart, perm=[0, 1, 3, 2, 4])
        qkv = graph.op("Reshape", together, graph.vector(1, -1, 3 * numbers.heads * numbers.head_size))
    if not blocks.of_queries:
        return (qkv,)
    queries, keys, values = inputs.split(qkv, layer, numbers.heads)
    return (
        _of_heads(graph, blocks, numbers, queries, f"{name}.{blocks.of_queries}", numbers.heads),
        _of_heads(graph, blocks, numbers, keys, f"{name}.{blocks.of_keys}", numbers.kv_heads),
        values,
    )


def _of_heads(graph: Graph, blocks: Blocks, numbers: Numbers, x: str, norm: str, heads: int) -> str:
    """Norm x (1, length, heads * head size): each head by itself where the weight is as long as one."""
    by_itself = len(graph.weights.rest[f"{norm}.weight"]) == numbers.head_size
    if by_itself:
        x = graph.op("Reshape", x, graph.vector(1, -1, heads, numbers.head_size))
    x = graph.norm(x, norm, numbers.epsilon, blocks.norm_offset)
    return graph.op("Reshape", x, graph.vector(1, -1, heads * numbers.head_size)) if by_itself else x


def _inner(graph: Graph, blocks: Blocks, numbers: Numbers, name: str, x: str) -> str:
    inner = graph.linear(x, *(f"{name}.{part}" for part in blocks.into_mlp))
    if not blocks.gated:
        return graph.linear(graph.activate(inner, numbers.activation), f"{name}.{blocks.out_of_mlp}")
    gate, up = graph.ops([f"{name}.gate", f"{name}.up"], "Split", inner, axis=-1, num_outputs=2)
    product = graph.op("Mul", graph.activate(gate, numbers.activation), up)
    return graph.linear(product, f"{name}.{blocks.out_of_mlp}")


def _rotary(graph: Graph, config: PreTrainedConfig, cache: KeyValueShape, kind: str) -> tuple[str, str]:
    """Return the tables (longest, turned part of a head / 2) of cosines and sines, as the model itself computes
    them; `kind` is that of the layers, where a model has several."""
    rotary = type(skeleton(config).base_model.rotary_emb)(config)
    given = (torch.zeros(1), torch.arange(cache.longest)[None], *([kind] if kind else []))
    cosines, sines = (
        np.ascontiguousarray(table[0, :, : table.shape[-1] // 2].float().numpy()) for table in rotary(*given)
    )
    return graph.tensor(f"rotary.cos{kind}", cosines), graph.tensor(f"rotary.sin{kind}", sines)


def _described(config: PreTrainedConfig) -> tuple[Blocks, Numbers]:
    blocks = families()[config.model_type].blocks or Blocks()
    return blocks, numbers_of(config, blocks)
