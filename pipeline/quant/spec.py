"""Frozen values that say what is quantized and how; functions elsewhere do it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

WEIGHT_WIDTHS = (2, 4, 8, 32)
ACTIVATION_WIDTHS = (8, 32)
UNQUANTIZED = 32

Granularity = Literal["tensor", "row"]
GammaInit = Literal["one", "mse", "auto"]
ActivationRange = Literal["token", "tensor"]
AttentionOperands = Literal["none", "qkv", "qkv_probabilities"]
Ste = Literal["clipped", "identity"]
Encoding = Literal["dense", "base3"]


def levels(bits: int) -> int:
    """n = 2^(b-1) - 1: the largest code. The grid is {-n, ..., n} / n (Tao et al. 2022, section 3)."""
    return (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class BitWidths:
    """`W-E-A`: bits of Transformer-layer weights, of the word embedding, and of activations."""

    weights: int
    embedding: int
    activations: int

    def __post_init__(self) -> None:
        for part, width, offered in (
            ("weights", self.weights, WEIGHT_WIDTHS),
            ("embedding", self.embedding, WEIGHT_WIDTHS),
            ("activations", self.activations, ACTIVATION_WIDTHS),
        ):
            if width not in offered:
                valid = ", ".join(map(str, offered))
                raise ValueError(f"bits {self}: {width} bits are not offered for {part}; valid: {valid}")

    @classmethod
    def parse(cls, text: str) -> BitWidths:
        """Read "2-2-8". Raises ValueError naming the valid widths."""
        if not re.fullmatch(r"\d+-\d+-\d+", text):
            raise ValueError(f"bits {text!r} is not of the form W-E-A, such as 2-2-8")
        return cls(*map(int, text.split("-")))

    def __str__(self) -> str:
        return f"{self.weights}-{self.embedding}-{self.activations}"


@dataclass(frozen=True)
class QuantSpec:
    """How a student is quantized while it trains.

    `granularity` is that of the linear layers; word embeddings and heads always have one scale per row.
    `gamma_init: auto` starts ternary modules at 1 and wider ones at the gamma of least squared error: at 4 and 8 bits
    gamma = 1 clips far inside the distribution, at 2 bits the minimiser is not the better start (measured).
    `overrides` maps a regular expression over module names to a weight width; the first full match wins.
    """

    bits: BitWidths
    granularity: Granularity = "tensor"
    gamma_init: GammaInit = "auto"
    ste: Ste = "clipped"
    activation_range: ActivationRange = "token"
    attention: AttentionOperands = "none"
    overrides: tuple[tuple[str, int], ...] = ()

    def weight_bits(self, module: str, role: Literal["linear", "embedding"]) -> int:
        for pattern, width in self.overrides:
            if re.fullmatch(pattern, module):
                return width
        return self.bits.weights if role == "linear" else self.bits.embedding

    def gamma_start(self, bits: int) -> Literal["one", "mse"]:
        if self.gamma_init == "auto":
            return "one" if bits == 2 else "mse"
        return self.gamma_init
