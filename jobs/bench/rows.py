"""What `bench quantizers` compares: every row is values laid over the same configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.config.presets import PRESETS, RATIO_LR, WIDE_MUON_LR, PresetName
from pipeline.quant.granularity import GROUP_SIZES, PER_CHANNEL, PER_TENSOR, Granularity
from pipeline.quant.spec import TERNARY_ONLY, UNQUANTIZED, BitWidths, grid, levels_of

PAPER: PresetName = "paper"
BEST: PresetName = "best"
SMALLEST: PresetName = "smallest"
# The paper's recipe as it suits a budget of some hundred steps: gamma starts where its width is best and moves as fast
# as the other rows' scales, and its contrast has whichever weight validation finds best. All is compared with it.
REFERENCE = "paper, scaled to the budget"
WITHOUT_CONTRAST = "quantgpt, per_tensor"
CONTRAST_WEIGHTS = (0.0, 0.03, 0.1)
WITH_CONTRAST = {weight: f"{WITHOUT_CONTRAST}, contrast {weight:g}" for weight in CONTRAST_WEIGHTS[1:]}


Key = tuple[str, str]  # a row, or a method of the paper, and its bits


class Try(NamedTuple):
    """What a search varies: the learning rate, and the weight of the contrastive loss."""

    rate: float
    contrast_weight: float


@dataclass(frozen=True)
class Row:
    """A recipe: sections of a configuration, and whether it trains at all."""

    name: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: bool = True
    contrasts: tuple[float, ...] = ()  # weights of the contrastive loss that its search tries; none: it has its own

    @property
    def rate_knob(self) -> str:
        """Return the learning rate that its search varies."""
        return "muon_lr" if self.sections.get("distill", {}).get("optimizer") == "muon" else "lr"

    def rate(self, bits: str) -> float:
        """Return the learning rate that suits its optimizer and the width; of best and smallest their own. Training
        moves weights by steps that 4 and 8 bits resolve, so those want smaller rates."""
        narrow = BitWidths.parse(bits).weights == 2
        return {"lr": (5e-4, 4e-3), "muon_lr": (WIDE_MUON_LR, 0.03)}[self.rate_knob][narrow]

    def rates(self, bits: str) -> tuple[float, ...]:
        """Return the learning rates of its search: as many for each row, around `rate`."""
        middle = self.rate(bits)
        return (middle / 2, middle, middle * 2) if self.trained else (middle,)

    def tries(self, bits: str) -> tuple[Try, ...]:
        """Return what its search tries: each rate with each weight of the contrastive loss."""
        weights = self.contrasts or (self.sections["distill"]["contrast_weight"],)
        return tuple(Try(*values) for values in itertools.product(self.rates(bits), weights))

    def own_try(self, bits: str) -> Try:
        """Return what it takes without a search: the one in the middle."""
        tries = self.tries(bits)
        return tries[len(tries) // 2]

    @property
    def quantizer(self) -> Any:
        """Return the name of its quantizer."""
        return self.sections["quant"].get("quantizer", "quantgpt")

    def offered_at(self, bits: str, overrides: Iterable[int] = ()) -> bool:
        """Tell whether the recipe exists at these widths, and those of `overrides`: ternary ones only at 2 bits."""
        ternary_only = self.quantizer in TERNARY_ONLY or self.name.startswith(SMALLEST)
        widths = BitWidths.parse(bits)
        others = {widths.embedding, *overrides}
        return not ternary_only or (widths.weights == 2 and others <= {2, UNQUANTIZED})

    def ternary_at(self, bits: str) -> bool:
        """Tell whether its weights have three levels at these widths."""
        return grid(levels_of(self.quantizer), BitWidths.parse(bits).weights).ternary


# Those whose scale is a learned ratio move it as fast as the presets do: at 2 bits the paper's 1e-3 hardly moves it in
# some hundred steps, which costs up to 0.1 nats of validation on the Llama that the README compares.
LEARN_A_RATIO = ("quantgpt", "lsq", "lsq_symmetric", "seq")


def _quantizer(quantizer: str, granularity: str | dict[str, int]) -> Row:
    moved = {"gamma_lr": RATIO_LR} if quantizer in LEARN_A_RATIO else {}
    quant = {"quantizer": quantizer, "granularity": granularity}
    name = f"{quantizer}, {Granularity.parse(granularity)}"
    return Row(name, {"quant": quant, "distill": {"contrast_weight": 0.0, **moved}})


def _scaled(name: str, contrast_weight: float, contrasts: tuple[float, ...] = ()) -> Row:
    distill = {**PRESETS["paper"]["distill"], "gamma_lr": RATIO_LR, "contrast_weight": contrast_weight}
    quant = {"quantizer": "quantgpt", "granularity": "per_tensor"}
    return Row(name, {"quant": quant, "distill": distill}, contrasts=contrasts)


def _rounding(name: str, quantizer: str) -> Row:
    quant = {"quantizer": quantizer, "granularity": "per_channel", "gamma_init": "mse"}
    return Row(name, {"quant": quant, "distill": {"steps": 0, "contrast_weight": 0.0}}, trained=False)


ROWS: tuple[Row, ...] = (
    _rounding("rounding, per_channel", "quantgpt"),
    _rounding("rounding, seq, per_channel", "seq"),
    _quantizer("pact", "per_tensor"),
    _quantizer("twn", "per_tensor"),
    _quantizer("twn", "per_channel"),
    _quantizer("statistics", "per_tensor"),
    _quantizer("statistics", "per_channel"),
    _quantizer("laq_uniform", "per_tensor"),
    _quantizer("laq", "per_tensor"),
    _quantizer("laq", "per_channel"),
    _quantizer("lsq_symmetric", "per_channel"),
    _quantizer("lsq", "per_tensor"),
    _quantizer("lsq", "per_channel"),
    _quantizer("seq", "per_channel"),
    _quantizer("quantgpt", "per_tensor"),
    *(_scaled(name, weight) for weight, name in WITH_CONTRAST.items()),
    _quantizer("quantgpt", "per_channel"),
    _scaled(REFERENCE, 0.0, CONTRAST_WEIGHTS),
    *(Row(name, PRESETS[name]) for name in (PAPER, SMALLEST, BEST)),
)


def rows_at(granularity: Granularity) -> tuple[Row, ...]:
    """Return every quantizer, and the presets that are not the paper's, with scales of one granularity."""
    written = granularity.written()
    presets = [
        Row(f"{name}, {granularity}", {**PRESETS[name], "quant": {**PRESETS[name]["quant"], "granularity": written}})
        for name in (SMALLEST, BEST)
    ]
    return (*(_quantizer(name, written) for name in dict.fromkeys(row.quantizer for row in ROWS)), *presets)


EVERY_ROW = {
    row.name: row
    for granularity in (PER_TENSOR, PER_CHANNEL, *(Granularity("per_group", size) for size in GROUP_SIZES))
    for row in rows_at(granularity)
} | {row.name: row for row in ROWS}


def named(name: str) -> Row:
    """Return the row of a name. Raises KeyError for a name that is none."""
    return EVERY_ROW[name]
