"""Frozen values that say what is quantized and how; functions elsewhere do it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.quant.granularity import PER_CHANNEL, PER_TENSOR, Granularity

WEIGHT_WIDTHS = (2, 4, 8, 32)
ACTIVATION_WIDTHS = (8, 32)
UNQUANTIZED = 32

GammaInit = Literal["one", "mse", "auto"]
GammaGradient = Literal["both", "outer"]
ActivationRange = Literal["token", "tensor"]
AttentionOperands = Literal["none", "qkv", "qkv_probabilities"]
Ste = Literal["auto", "clipped", "wide", "identity"]
Encoding = Literal["dense", "base3"]
Levels = Literal["symmetric", "full", "midpoint"]
Positions = Literal["fp32", "fp16", "int8"]
QuantizerName = Literal["quantgpt", "pact", "lsq", "lsq_symmetric", "laq", "laq_uniform", "twn", "statistics", "seq"]

LEVELS: dict[QuantizerName, Levels] = {"lsq": "full", "seq": "midpoint"}  # the others: symmetric
TAKES: dict[str, tuple[QuantizerName, ...]] = {
    "gamma_init": ("quantgpt", "pact", "lsq", "lsq_symmetric", "seq"),
    "gamma_gradient": ("quantgpt",),
    "ste": ("quantgpt", "lsq", "lsq_symmetric", "laq", "laq_uniform", "twn", "statistics", "seq"),
}
TERNARY_ONLY: tuple[QuantizerName, ...] = ("twn", "statistics")


def levels(bits: int) -> int:
    """Return n = 2^(b-1) - 1, the largest code of the symmetric grid {-n, ..., n} / n (Tao et al. 2022, section 3)."""
    return (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """The levels (code + shift) * scale of the whole-number codes low..high."""

    low: int
    high: int
    shift: float = 0.0

    @property
    def edge(self) -> float:
        """Return the distance of the outermost level from zero, in scales."""
        return max(-(self.low + self.shift), self.high + self.shift)

    @property
    def ternary(self) -> bool:
        """Tell whether the levels are -1, 0 and 1 times the scale."""
        return (self.low, self.high, self.shift) == (-1, 1, 0.0)


def grid(kind: Levels, bits: int) -> Grid:
    """Return the grid of a kind: `symmetric` has 2^b - 1 levels around zero; `full` all 2^b of two's complement;
    `midpoint` 2^b around zero and none at zero. Raises ValueError for another kind."""
    n = levels(bits)
    grids = {"symmetric": Grid(-n, n), "full": Grid(-n - 1, n), "midpoint": Grid(-n - 1, n, 0.5)}
    if kind not in grids:
        raise ValueError(f"levels {kind!r} are not known; valid: {', '.join(grids)}")
    return grids[kind]


def levels_of(quantizer: QuantizerName) -> Levels:
    """Return the kind of grid that a quantizer uses."""
    return LEVELS.get(quantizer, "symmetric")


@dataclass(frozen=True)
class BitWidths:
    """`W-E-A`: bits of Transformer-layer weights, of the word embedding, and of activations."""

    weights: int
    embedding: int
    activations: int

    def __post_init__(self) -> None:
        for part, width in vars(self).items():
            offered = ACTIVATION_WIDTHS if part == "activations" else WEIGHT_WIDTHS
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

    `granularity` is that of the linear layers; word embeddings and heads always have one scale a row.
    `gamma_init`: `one` is the published start of the quantizer (gamma = 1 for QuantGPT), `mse` the scale of least
    squared error; `auto` is the published one, but for QuantGPT at 4 and 8 bits, where gamma = 1 clips far inside the
    distribution (measured; at 2 bits the minimiser is not the better start).
    `gamma_gradient: outer` is PACT's gradient for gamma, the ablation of Tao et al. 2022.
    `ste` is the straight-through gradient: `clipped` ends at the outermost levels, `wide` half a scale beyond, where a
    weight still rounds to them, `identity` nowhere; `auto` is the one each quantizer was published with.
    `attention` is `none` by default: at 2-2-8 quantized operands changed validation by less than the noise of a seed,
    and not every runtime has them.
    `overrides` maps a regular expression over module names to a weight width; the first full match wins.
    """

    bits: BitWidths
    quantizer: QuantizerName = "quantgpt"
    granularity: Granularity = PER_TENSOR
    gamma_init: GammaInit = "auto"
    gamma_gradient: GammaGradient = "both"
    ste: Ste = "auto"
    activation_range: ActivationRange = "token"
    attention: AttentionOperands = "none"
    overrides: tuple[tuple[str, int], ...] = ()

    def weight_bits(self, module: str, role: str) -> int:
        """Return the weight width of a module: that of the first override that matches, else that of its role."""
        own = self.bits.weights if role == "linear" else self.bits.embedding
        return next((width for pattern, width in self.overrides if re.fullmatch(pattern, module)), own)

    def granularity_of(self, role: str) -> Granularity:
        """Return the granularity of a module's scales: `granularity` of a linear layer, else one scale a row."""
        return self.granularity if role == "linear" else PER_CHANNEL

    def starts_at_least_error(self, bits: int) -> bool:
        """Tell whether a weight of so many bits starts at the scale of least squared error, not the published one."""
        if self.gamma_init == "auto":
            return self.quantizer == "quantgpt" and bits > 2
        return self.gamma_init == "mse"
