"""What is claimed of the presets, checked against a table of the bench: each claim with its number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from jobs.bench.rows import BEST, REFERENCE, SMALLEST, WITH_CONTRAST, WITHOUT_CONTRAST, named
from jobs.bench.summary import Interval, Line
from pipeline.config.presets import PRESETS

# Perplexity of `best` over its teacher's, less 1: of the two teachers that README.md compares, by name.
CLOSE = {"quickstart": {"4-4-8": 0.01, "8-8-8": 0.003}, "bench-stories260K": {"4-4-8": 0.05, "8-8-8": 0.01}}


Verdict = Literal["NOT met", "open", "tie", "met"]  # the first of several decides
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Claim:
    """A claim, what became of it, and by what number. A tie: an interval reaches to both sides; open: one seed cannot
    say."""

    text: str
    verdict: Verdict
    number: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.text}: {self.number}"


def claims(lines: Iterable[Line], name: str, failed: Iterable[tuple[str, str]] = ()) -> list[Claim]:
    """Return the claims that the rows and widths of the table of a configuration of this name allow to check. `failed`
    has the rows, and their bits, that have no place in the table."""
    checked = [Claim(f"{bits}: {row} trains", "NOT met", "it failed") for row, bits in failed if row in PRESETS]
    by_width: dict[str, dict[str, Line]] = {}
    for line in lines:
        by_width.setdefault(line.bits, {})[line.row] = line
    for bits, rows in by_width.items():
        if bits == "2-2-8":
            checked += [*_narrow(rows), *_contrast(rows)]
        most = CLOSE.get(name, {}).get(bits)
        if most is not None and BEST in rows:
            checked.append(_close(rows[BEST], most))
    return checked


def _close(best: Line, most: float) -> Claim:
    text = f"{best.bits}: the perplexity of {BEST} within {most:.1%} of the teacher's"
    over, ends = math.expm1(best.gap_nats), best.gap_interval.ends
    high = max((math.expm1(high) for _, high in ends), default=over) if best.seeds > 1 else math.inf
    number = best.gap_interval.shown(lambda nats: f"{math.expm1(nats):+.2%}")
    return Claim(text, "NOT met" if over > most else "met" if high <= most else "open", number)


def _narrow(rows: dict[str, Line]) -> Iterator[Claim]:
    for preset, rivals in ((BEST, "row"), (SMALLEST, "ternary row")):
        others = [r for key, r in rows.items() if key != preset and (preset == BEST or named(key).ternary_at(r.bits))]
        if preset not in rows or not others:
            continue
        nearest = min(others, key=lambda row: row.gap_nats)
        least = _all(_beyond_zero(row.less(preset), 1) for row in others)
        number = f"{rows[preset].gap_nats:.4f} nats; next of {len(others)}, {nearest.row}, {nearest.gap_nats:.4f}"
        number += f" (less that of {preset}: {nearest.less(preset)})"
        yield Claim(f"2-2-8: {preset} has the smallest gap of each {rivals}, intervals without zero", least, number)
        if REFERENCE in rows:
            yield _share(rows[preset], rows[REFERENCE])


def _share(preset: Line, reference: Line) -> Claim:
    """Return how much of the reference's gap is left, and at how many of its bytes."""
    share = f"{preset.gap_nats / reference.gap_nats:.2f} of it" if reference.gap_nats > 0 else "no share of none"
    size = preset.packed_bytes / reference.packed_bytes
    less = preset.less(REFERENCE)
    text = f"2-2-8: the gap of {preset.row} is smaller than that of {REFERENCE}, intervals without zero"
    return Claim(text, _beyond_zero(less, -1), f"{share} in {size:.2f} of the bytes; less it {less} nats")


def _contrast(rows: dict[str, Line]) -> Iterator[Claim]:
    """Check what the contrastive loss is for: representations of different tokens less alike, perplexity no worse."""
    for weight, name in WITH_CONTRAST.items():
        if name not in rows:
            continue
        cosine, gap = (rows[name].less(WITHOUT_CONTRAST, metric) for metric in ("token_cosine", "gap_nats"))
        if cosine is not None and gap is not None:
            verdict = _all((_beyond_zero(cosine, -1), _beyond_zero(gap, -1)))
            text = f"2-2-8: contrast at weight {weight} lowers the cosine between tokens, and the gap"
            yield Claim(text, verdict, f"the cosine changes by {cosine.mean:+.4f}, the gap by {gap} nats")


def _beyond_zero(interval: Interval | None, sign: int) -> Verdict:
    """Tell whether the whole interval lies on that side of zero. One seed may deny it, and not say it."""
    if interval is None:
        return "open"
    if interval.mean == 0 or (interval.low is not None and not interval.excludes_zero):
        return "tie"
    return "NOT met" if interval.mean * sign < 0 else "open" if interval.low is None else "met"


def _all(parts: Iterable[Verdict]) -> Verdict:
    """Return what several parts of a claim come to."""
    return min(parts, key=VERDICTS.index)
