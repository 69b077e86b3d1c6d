"""How the student is quantized, and how it is stored."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal

from pydantic import field_serializer, field_validator, model_validator

from pipeline.config.base import Closed, FloatType
from pipeline.quant import spec as kinds
from pipeline.quant.granularity import Granularity
from pipeline.quant.spec import TAKES, TERNARY_ONLY, UNQUANTIZED, WEIGHT_WIDTHS, BitWidths, QuantSpec, grid, levels_of


class PerGroup(Closed):
    """One scale for so many neighbours of a row, whose length it divides."""

    per_group: Literal[32, 64, 128]

    def __str__(self) -> str:
        return f"per_group {self.per_group}"


class Quant(Closed):
    """How the student is quantized, and in which dtypes scales and all other tensors ship."""

    bits: str = "2-2-8"
    quantizer: kinds.QuantizerName = "quantgpt"
    granularity: Literal["per_tensor", "per_channel"] | PerGroup = "per_tensor"
    gamma_init: kinds.GammaInit = "auto"
    gamma_gradient: kinds.GammaGradient = "both"
    ste: kinds.Ste = "auto"
    activation_range: kinds.ActivationRange = "token"
    attention: kinds.AttentionOperands = "none"
    overrides: dict[str, int] = {}
    scale_dtype: FloatType = "float32"
    rest_dtype: FloatType = "float32"
    positions: kinds.Positions | None = None  # null: as rest_dtype

    @field_validator("overrides", mode="before")
    @classmethod
    def _pairs_in_order(cls, overrides: Any) -> Any:
        pairs = isinstance(overrides, list | tuple) and all(
            isinstance(p, list | tuple) and len(p) == 2 for p in overrides
        )
        return dict(overrides) if pairs else overrides

    @field_serializer("overrides")
    def _order_counts(self, overrides: dict[str, int]) -> Any:
        """Return pairs where there are several: the first match wins, and a mapping's order would not enter the key."""
        return overrides if len(overrides) < 2 else [list(pair) for pair in overrides.items()]

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: str) -> str:
        return str(BitWidths.parse(bits))

    @field_validator("overrides")
    @classmethod
    def _known_overrides(cls, overrides: dict[str, int]) -> dict[str, int]:
        for pattern, bits in overrides.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"overrides: {pattern!r} is not a regular expression: {error}") from error
            if bits not in WEIGHT_WIDTHS:
                valid = ", ".join(map(str, WEIGHT_WIDTHS))
                raise ValueError(f"overrides[{pattern!r}]: {bits} bits are not offered; valid: {valid}")
        return overrides

    @model_validator(mode="after")
    def _options_of_the_quantizer(self) -> Quant:
        for option, value in self.changed(*TAKES):
            if self.quantizer not in TAKES[option]:
                raise ValueError(
                    f"{option} is {value}, which the quantizer {self.quantizer} does not take; leave it out, or use "
                    f"one of {', '.join(TAKES[option])}"
                )
        return self

    @model_validator(mode="after")
    def _ternary_where_it_must_be(self) -> Quant:
        wide = [bits for bits in self.weight_widths() if bits not in (2, UNQUANTIZED)]
        if self.quantizer in TERNARY_ONLY and wide:
            raise ValueError(
                f"quantizer {self.quantizer} gives ternary weights only, and bits are {self.bits} with overrides "
                f"{self.overrides}; use 2 (or 32) bits throughout, or another quantizer"
            )
        return self

    @model_validator(mode="after")
    def _activations_to_quantize(self) -> Quant:
        for knob, value in self.changed("activation_range", "attention"):
            if BitWidths.parse(self.bits).activations == UNQUANTIZED:
                raise ValueError(
                    f"{knob} is {value} and has no effect, because bits {self.bits} leave activations as they are; "
                    "leave it out, or use 8 bits for activations"
                )
        return self

    def weight_widths(self) -> list[int]:
        """Return every weight width that some module may have, overrides included."""
        bits = BitWidths.parse(self.bits)
        return [bits.weights, bits.embedding, *self.overrides.values()]

    @property
    def ternary(self) -> bool:
        """Tell whether all that is quantized has three levels."""
        levels = levels_of(self.quantizer)
        return all(bits == UNQUANTIZED or grid(levels, bits).ternary for bits in self.weight_widths())

    def spec(self) -> QuantSpec:
        """Return the spec by which the student's modules are made."""
        granularity = self.granularity if isinstance(self.granularity, str) else self.granularity.model_dump()
        own = {
            "bits": BitWidths.parse(self.bits),
            "overrides": tuple(self.overrides.items()),
            "granularity": Granularity.parse(granularity),
        }
        return QuantSpec(**{field.name: getattr(self, field.name) for field in fields(QuantSpec)} | own)


class Pack(Closed):
    """How codes are put into bytes."""

    encoding: kinds.Encoding = "dense"
