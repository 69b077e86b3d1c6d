"""What is claimed of the presets, checked against a table of the bench: each claim with its number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jobs.bench.rows import BEST, PAPER, SMALLEST, WITHOUT_CONTRAST, named
from jobs.bench.summary import Interval, Line

MOST_OF_PAPERS = {BEST: 0.5, SMALLEST: 0.8}
# Perplexity of `best` over its teacher's, less 1: of the two teachers that the README compares, by family.
CLOSE = {"gpt2": {"4-4-8": 0.01, "8-8-8": 0.003}, "llama": {"4-4-8": 0.05, "8-8-8": 0.01}}


@dataclass(frozen=True)
class Claim:
    """A claim, whether the table bears it out (None: of one seed it cannot say), and by what number."""

    text: str
    met: bool | None
    number: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "NOT met", None: "open, no interval"}[self.met]
        return f"{verdict}: {self.text}: {self.number}"


def claims(lines: Iterable[Line], family: str) -> list[Claim]:
    """Those that the rows and widths of the table allow to check."""
    found: list[Claim] = []
    by_width: dict[str, dict[str, Line]] = {}
    for line in lines:
        by_width.setdefault(line.bits, {})[line.row] = line
    for bits, rows in by_width.items():
        if bits == "2-2-8":
            found += [*_narrow(rows), *_contrast(rows)]
        most = CLOSE.get(family, {}).get(bits)
        if most is not None and BEST in rows:
            over = math.exp(rows[BEST].gap_nats) - 1
            text = f"{bits}: the perplexity of {BEST} within {most:.1%} of the teacher's"
            found.append(Claim(text, over <= most, f"{over:+.2%}"))
    return found


def _narrow(rows: dict[str, Line]) -> Iterator[Claim]:
    for preset, rivals in ((BEST, "row"), (SMALLEST, "ternary row")):
        if preset not in rows or PAPER not in rows:
            continue
        others = [
            r for name, r in rows.items() if name != preset and (preset == BEST or named(name).ternary_at(r.bits))
        ]
        nearest = min(others, key=lambda row: row.gap_nats)
        least = _all(_above(row.less(preset)) for row in others)
        number = f"{rows[preset].gap_nats:.4f} nats; next of {len(others)}, {nearest.row}, {nearest.gap_nats:.4f}"
        yield Claim(f"2-2-8: {preset} has the smallest gap of each {rivals}, intervals without zero", least, number)
        ratio, most = rows[preset].gap_nats / rows[PAPER].gap_nats, MOST_OF_PAPERS[preset]
        yield Claim(
            f"2-2-8: the gap of {preset} is at most {most:g} of the paper's recipe", ratio <= most, f"{ratio:.3f}"
        )


def _contrast(rows: dict[str, Line]) -> Iterator[Claim]:
    """What the contrastive loss is for: representations of different tokens less alike, at no cost in perplexity."""
    if WITHOUT_CONTRAST not in rows or PAPER not in rows:
        return
    cosine, gap = (rows[WITHOUT_CONTRAST].less(PAPER, metric) for metric in ("token_cosine", "gap_nats"))
    if cosine is not None and gap is not None:
        met = _all((_above(cosine), None if gap.low is None else gap.mean >= 0 or not gap.excludes_zero))
        number = f"without it the cosine changes by {cosine.mean:+.4f}, the gap by {gap.mean:+.4f} nats"
        yield Claim("2-2-8: contrast lowers the cosine between tokens, at equal or better perplexity", met, number)


def _above(interval: Interval | None) -> bool | None:
    if interval is None or (interval.low is None and interval.mean > 0):
        return None
    return interval.excludes_zero and interval.mean > 0


def _all(parts: Iterable[bool | None]) -> bool | None:
    """Whether all are so; one that is not decides, whatever is open."""
    found = set(parts)
    return False if False in found else None if None in found else True
