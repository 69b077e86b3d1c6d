"""What the decoders of all families share: their inputs, the key-value cache, and causal attention over it.

Inputs: input_ids (1, length) and attention_mask (1, total), ones for every token so far, the new ones included; and
past_key_values.N.key and .value (1, heads, past, head size). Outputs: logits (1, length, vocabulary), present.N.key and
.value. Where past and present are one buffer of the longest length, keys and values are written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from pipeline.runtime.graph import CONTRIB, Graph

FIRST_LOGIT = "first_logit"  # logits from this place on; -1: of the last token only
ATTENTION_BIAS = 10  # input of GroupQueryAttention
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
        self.places = graph.op("Range", graph.number(0), total, graph.number(1))  # (total,), of all tokens
        self.positions = graph.op("Range", graph.op("Sub", total, length), total, graph.number(1))  # (length,)

    def attend(
        self,
        qkv: Sequence[str],
        layer: int,
        heads: int,
        rotary: tuple[str, str] | None = None,
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        added: str = "",
    ) -> str:
        """Draw causal attention: queries, keys and values (1, length, columns), side by side in one tensor or apart, to
        (1, length, columns of queries).

        Args:
            rotary: tables (longest, turned part of a head / 2) of cosines and sines.
            window: how many tokens one attends to, itself included; 0 for all.
            scale: factor of scores, by default 1 / sqrt(head size).
            softcap: bound of scores; 0 for none.
            added: what is added to scores (1, heads, length, total).
        """
        operands = [*qkv, *[""] * (3 - len(qkv))]
        if rotary and not self._turned_by_kernel(rotary):
            operands, rotary = self._rotated(qkv, layer, heads, rotary), None
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        result = [f"attention.{layer}", *(f"present.{layer}.{part}" for part in ("key", "value"))]
        inputs = [*operands, *past, self._last, self._total, *(rotary or ())]
        if added:
            inputs = [*inputs, *[""] * (ATTENTION_BIAS - len(inputs)), added]
        kernel: dict[str, Any] = {"num_heads": heads, "kv_num_heads": self.cache.heads}
        kernel["do_rotary"] = int(rotary is not None)
        kernel |= {"scale": scale} if scale is not None else {}
        kernel |= {"softcap": softcap} if softcap else {}
        kernel |= {"local_window_size": window} if window else {}
        return self.graph.ops(result, "GroupQueryAttention", *inputs, domain=CONTRIB, **kernel)[0]

    def split(self, qkv: str, layer: int, heads: int) -> Sequence[str]:
        """Return queries, keys and values, (1, length, columns) each, of one tensor that has them side by side."""
        counts = (heads, self.cache.heads, self.cache.heads)
        sizes = self.graph.vector(*(count * self.cache.head_size for count in counts))
        return self.graph.ops([f"{part}.{layer}" for part in "qkv"], "Split", qkv, sizes, axis=-1)

    def _turned_by_kernel(self, rotary: tuple[str, str]) -> bool:
        size = self.cache.head_size
        return size % ROTARY_MULTIPLE == 0 and 2 * self.graph.columns(rotary[0]) == size

    def _rotated(self, qkv: Sequence[str], layer: int, heads: int, rotary: tuple[str, str]) -> list[str]:
        """Turn queries and keys by an operator of their own, where the attention kernel does not take their size."""
        graph = self.graph
        queries, keys, values = qkv if len(qkv) == 3 else self.split(qkv[0], layer, heads)
        places = graph.op("Reshape", self.positions, graph.vector(1, -1))
        part = 2 * graph.columns(rotary[0])
        kernel: dict[str, Any] = {"rotary_embedding_dim": part} if part != self.cache.head_size else {}
        turned = [
            graph.op("RotaryEmbedding", x, places, *rotary, domain=CONTRIB, num_heads=count, **kernel)
            for x, count in ((queries, heads), (keys, self.cache.heads))
        ]
        return [*turned, values]

    def finish(
        self,
        x: str,
        head: str,
        vocabulary: int,
        bias: str | None = None,
        divisor: float = 1.0,
        cap: float = 0.0,
    ) -> None:
        """Draw the head, x (1, length, hidden) to logits, which `divisor` divides and `cap` bounds, and the outputs."""
        graph, cache = self.graph, self.cache
        if self._sliced:
            x = graph.op("Slice", x, FIRST_LOGIT, graph.vector(INT_MAX), graph.vector(1))
        if divisor == 1.0 and not cap:
            graph.head(x, head, bias, "logits")
        else:
            logits = graph.scale(graph.head(x, head, bias, ""), 1 / (divisor * (cap or 1.0)), "" if cap else "logits")
            if cap:
                graph.scale(graph.op("Tanh", logits), cap, "logits")
        graph.output("logits", [1, "logits", vocabulary])
        for name in cache.names("present"):
            graph.output(name, [1, cache.heads, "total_or_longest", cache.head_size])
