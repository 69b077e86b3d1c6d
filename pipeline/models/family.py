"""What distinguishes one family of models from another, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Module names of one transformers architecture.

    `linears` maps a regular expression over module names to whether the layer's input is quantized symmetrically.
    """

    name: str
    linears: tuple[tuple[str, bool], ...]
    embedding: str
    tied_embeddings: tuple[str, ...] = field(default=(), kw_only=True)  # further names of the embedding's table
    unquantized: tuple[str, ...]  # modules with a weight that stay in full precision
    head: str = "lm_head"
