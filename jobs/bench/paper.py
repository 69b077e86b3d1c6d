"""`bitmill bench paper`: the tables of Tao et al. (ACL 2022) beside ours.

Every cell of the paper says whether we saw it in a public source or recall it; an unmarked figure is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["tiny", "full"]
WIDTHS = ("8-8-8", "4-4-8", "2-2-8")
FULL = "full precision"


@dataclass(frozen=True)
class Cell:
    """A figure of the paper, `seen` in a public source or recalled."""

    value: float
    seen: bool = False

    def __str__(self) -> str:
        return f"{self.value:g} ({'s' if self.seen else 'r'})"


def _cells(seen: str, *values: float) -> tuple[Cell, ...]:
    """One cell a value; `seen` has a letter for each, s or r."""
    return tuple(Cell(value, letter == "s") for value, letter in zip(values, seen, strict=True))


# Columns: perplexity on WikiText-2, PTB and WikiText-103, accuracy on Persona-Chat.
TABLE_1: dict[tuple[str, str], tuple[Cell, ...]] = {
    (FULL, "32"): _cells("srrs", 14.48, 14.72, 14.19, 77.01),
    ("quantgpt", "8-8-8"): _cells("sssr", 15.31, 14.90, 14.58, 76.12),
    ("quantgpt", "4-4-8"): _cells("rrrs", 15.55, 14.95, 15.31, 76.57),
    ("quantgpt", "2-2-8"): _cells("srss", 17.30, 16.12, 16.98, 74.78),
    ("pact", "8-8-8"): _cells("ssss", 17.49, 16.11, 16.76, 74.73),
    ("pact", "4-4-8"): _cells("ssss", 19.23, 20.17, 20.15, 25.13),
    ("pact", "2-2-8"): _cells("ssss", 173.02, 189.13, 171.03, 5.52),
    ("lsq", "8-8-8"): _cells("ssss", 16.75, 15.43, 15.24, 75.28),
    ("lsq", "4-4-8"): _cells("ssss", 78.99, 79.76, 75.12, 45.10),
    ("lsq", "2-2-8"): _cells("ssss", 847.54, 544.98, 1470.86, 5.54),
    ("laq", "8-8-8"): _cells("ssss", 16.91, 15.87, 15.88, 76.02),
    ("laq", "4-4-8"): _cells("ssss", 17.12, 16.55, 16.91, 71.17),
    ("laq", "2-2-8"): _cells("ssss", 19.15, 18.25, 18.97, 71.36),
}

# Columns: ROUGE-1, ROUGE-2, ROUGE-L of BART base on XSum.
TABLE_3: dict[tuple[str, str], tuple[Cell, ...]] = {
    (FULL, "32"): _cells("rrr", 40.75, 18.10, 33.05),
    ("quantgpt", "8-8-8"): _cells("rrr", 40.25, 17.78, 32.70),
    ("quantgpt", "4-4-8"): _cells("rrr", 40.24, 17.71, 32.69),
    ("quantgpt", "2-2-8"): _cells("rrr", 39.15, 16.72, 31.72),
}
