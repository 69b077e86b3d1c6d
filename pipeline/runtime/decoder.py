"""What the decoders of all families share: their inputs, the key-value cache, and causal attention over it.

Inputs: input_ids (1, length) and attention_mask (1, total), ones for every token so far, the new ones included; and
past_key_values.N.key and .value (1, heads, past, head size). Outputs: logits (1, length, vocabulary), present.N.key and
.value. Where past and present are one buffer of the longest length, keys and values are written in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from pipeline.runtime.graph import CONTRIB, Graph

FIRST_LOGIT = "first_logit"  # logits from this place on; -1: of the last token only
ROTARY_MULTIPLE = 16  # head sizes that the attention kernel turns itself
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class KeyValueShape:
    """Shape of the key-value cache of one sequence, and the most tokens that its text may have."""

    layers: int
    heads: int
    head_size: int
    longest: int

    def names(self, kind: str) -> list[str]:
        """Return the names KIND.N.key and .value of all layers."""
        return [f"{kind}.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


class Decoder:
    """The inputs of a decoder as soon as it is made; then `attend` in each layer and `finish`. With `sliced` it takes
    one more input, `first_logit` (1,): where the logits begin."""

    def __init__(self, graph: Graph, cache: KeyValueShape, sliced: bool) -> None:
        self.graph, self.cache, self._sliced = graph, cache, sliced
        self.ids = graph.input("input_ids", TensorProto.INT64, [1, "length"])
        mask = graph.input("attention_mask", TensorProto.INT64, [1, "total"])
        if sliced:
            graph.input(FIRST_LOGIT, TensorProto.INT64, [1])
        for name in cache.names("past_key_values"):
            graph.input(name, TensorProto.FLOAT, [1, cache.heads, "past", cache.head_size])
        total, length = graph.op("Size", mask), graph.op("Size", self.ids)
        last = graph.op("Reshape", graph.op("Sub", total, graph.number(1)), graph.vector(1))
        self._total = graph.op("Cast", total, to=TensorProto.INT32)
        self._last = graph.op("Cast", last, to=TensorProto.INT32)
        self.positions = graph.op("Range", graph.op("Sub", total, length), total, graph.number(1))  # (length,)

    def attend(self, qkv: str, layer: int, heads: int, rotary: tuple[str, str] | None = None) -> str:
        """Draw causal attention: qkv (1, length, queries + keys + values) to (1, length, queries). `rotary` are tables
        (longest, head size / 2) of cosines and sines."""
        operands, fused = [qkv, "", ""], self.cache.head_size % ROTARY_MULTIPLE == 0
        if rotary and not fused:
            operands, rotary = self._rotated(qkv, layer, heads, rotary), None
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        result = [f"attention.{layer}", *(f"present.{layer}.{part}" for part in ("key", "value"))]
        inputs = [*operands, *past, self._last, self._total, *(rotary or ())]
        kernel = {"num_heads": heads, "kv_num_heads": self.cache.heads, "do_rotary": int(rotary is not None)}
        return self.graph.ops(result, "GroupQueryAttention", *inputs, domain=CONTRIB, **kernel)[0]

    def _rotated(self, qkv: str, layer: int, heads: int, rotary: tuple[str, str]) -> list[str]:
        """Turn queries and keys by an operator of their own, where the attention kernel does not take their size."""
        graph, counts = self.graph, (heads, self.cache.heads, self.cache.heads)
        sizes = graph.vector(*(count * self.cache.head_size for count in counts))
        parts = graph.ops([f"{part}.{layer}" for part in "qkv"], "Split", qkv, sizes, axis=-1)
        places = graph.op("Reshape", self.positions, graph.vector(1, -1))
        turned = [
            graph.op("RotaryEmbedding", part, places, *rotary, domain=CONTRIB, num_heads=count)
            for part, count in zip(parts[:2], counts, strict=False)
        ]
        return [*turned, parts[2]]

    def finish(self, x: str, head: str, vocabulary: int, bias: str | None = None) -> None:
        """Draw the head, x (1, length, hidden) to logits, and the outputs."""
        graph, cache = self.graph, self.cache
        if self._sliced:
            x = graph.op("Slice", x, FIRST_LOGIT, graph.vector(INT_MAX), graph.vector(1))
        graph.head(x, head, bias, "logits")
        graph.output("logits", [1, "logits", vocabulary])
        for name in cache.names("present"):
            graph.output(name, [1, cache.heads, "total_or_longest", cache.head_size])
