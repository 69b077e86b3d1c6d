"""What `bench quantizers` compares: every row is values laid over the same configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.presets import PRESETS, RATIO_LR, WIDE_MUON_LR, PresetName
from pipeline.quant.spec import TERNARY_ONLY, UNQUANTIZED, BitWidths, grid, levels_of

PAPER: PresetName = "paper"
BEST: PresetName = "best"
SMALLEST: PresetName = "smallest"
WITHOUT_CONTRAST = "paper without contrast"


@dataclass(frozen=True)
class Row:
    """A recipe: sections of a configuration, and whether it trains at all."""

    name: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: bool = True

    @property
    def rate_knob(self) -> str:
        """The learning rate that its search varies."""
        return "muon_lr" if self.sections.get("distill", {}).get("optimizer") == "muon" else "lr"

    def rates(self, bits: str) -> tuple[float, ...]:
        """The learning rates of its search: as many for each row, around what suits its optimizer and the width.

        Training moves weights by steps that 4 and 8 bits resolve, so those want smaller rates.
        """
        narrow = BitWidths.parse(bits).weights == 2
        middle = {"lr": (5e-4, 4e-3), "muon_lr": (WIDE_MUON_LR, 0.03)}[self.rate_knob][narrow]
        return (middle / 2, middle, middle * 2) if self.trained else (middle,)

    @property
    def quantizer(self) -> Any:
        return self.sections["quant"].get("quantizer", "quantgpt")

    def offered_at(self, bits: str) -> bool:
        """Whether the recipe exists at these widths: ternary ones only at 2 bits."""
        ternary_only = self.quantizer in TERNARY_ONLY or self.name == SMALLEST
        widths = BitWidths.parse(bits)
        return not ternary_only or (widths.weights == 2 and widths.embedding in (2, UNQUANTIZED))

    def ternary_at(self, bits: str) -> bool:
        return grid(levels_of(self.quantizer), BitWidths.parse(bits).weights).ternary


# Those whose scale is a learned ratio move it as fast as the presets do: at the paper's 1e-3 it hardly moves in some
# hundred steps at 2 bits, and nearly all of them are worse for it on both teachers that the README compares.
LEARN_A_RATIO = ("quantgpt", "lsq", "lsq_symmetric", "seq")


def _quantizer(quantizer: str, granularity: str) -> Row:
    moved = {"gamma_lr": RATIO_LR} if quantizer in LEARN_A_RATIO else {}
    quant = {"quantizer": quantizer, "granularity": granularity}
    return Row(f"{quantizer}, {granularity}", {"quant": quant, "distill": {"contrast_weight": 0.0, **moved}})


ROWS: tuple[Row, ...] = (
    Row(
        "rounding, row",
        {"quant": {"granularity": "row", "gamma_init": "mse"}, "distill": {"steps": 0, "contrast_weight": 0.0}},
        trained=False,
    ),
    _quantizer("pact", "tensor"),
    _quantizer("twn", "tensor"),
    _quantizer("twn", "row"),
    _quantizer("statistics", "tensor"),
    _quantizer("statistics", "row"),
    _quantizer("laq_uniform", "tensor"),
    _quantizer("laq", "tensor"),
    _quantizer("laq", "row"),
    _quantizer("lsq_symmetric", "row"),
    _quantizer("lsq", "tensor"),
    _quantizer("lsq", "row"),
    _quantizer("seq", "row"),
    Row(
        WITHOUT_CONTRAST,
        {**PRESETS["paper"], "distill": {**PRESETS["paper"]["distill"], "contrast_weight": 0.0}},
    ),
    _quantizer("quantgpt", "tensor"),
    _quantizer("quantgpt", "row"),
    *(Row(name, PRESETS[name]) for name in (PAPER, SMALLEST, BEST)),
)


def named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def encoding_of(row: Row, bits: str) -> str:
    """The smallest encoding that holds the row's levels, so that bytes are compared at their best."""
    widths = BitWidths.parse(bits)
    return "base3" if (widths.weights, widths.embedding) == (2, 2) and row.ternary_at(bits) else "dense"
