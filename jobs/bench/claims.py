"""What is claimed of the presets, checked against a table of the bench: each claim with its number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jobs.bench.rows import BEST, REFERENCE, SMALLEST, WITH_CONTRAST, WITHOUT_CONTRAST, named
from jobs.bench.summary import Interval, Line
from pipeline.config.presets import PRESETS

# Perplexity of `best` over its teacher's, less 1: of the two teachers that README.md compares, by name.
CLOSE = {"quickstart": {"4-4-8": 0.01, "8-8-8": 0.003}, "bench-stories260K": {"4-4-8": 0.05, "8-8-8": 0.01}}


@dataclass(frozen=True)
class Claim:
    """A claim, whether the table bears it out, and by what number. None: one seed, or an interval that reaches to both
    sides, cannot say."""

    text: str
    met: bool | None
    number: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "NOT met", None: "open"}[self.met]
        return f"{verdict}: {self.text}: {self.number}"


def claims(lines: Iterable[Line], name: str, failed: Iterable[tuple[str, str]] = ()) -> list[Claim]:
    """Return the claims that the rows and widths of the table of a configuration of this name allow to check. `failed`
    has the rows, and their bits, that have no place in the table."""
    checked = [Claim(f"{bits}: {row} trains", False, "it failed") for row, bits in failed if row in PRESETS]
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
    number = " ".join([f"{over:+.2%}", *(f"[{math.expm1(low):+.2%}, {math.expm1(high):+.2%}]" for low, high in ends)])
    return Claim(text, False if over > most else True if high <= most else None, number)


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
    gaps = preset.gap_nats / (reference.gap_nats or math.nan)
    size = preset.packed_bytes / reference.packed_bytes
    less = preset.less(REFERENCE)
    text = f"2-2-8: the gap of {preset.row} is smaller than that of {REFERENCE}, intervals without zero"
    return Claim(text, _beyond_zero(less, -1), f"{gaps:.2f} of it in {size:.2f} of the bytes; less it {less} nats")


def _contrast(rows: dict[str, Line]) -> Iterator[Claim]:
    """Check what the contrastive loss is for: representations of different tokens less alike, perplexity no worse."""
    for weight, name in WITH_CONTRAST.items():
        if name not in rows:
            continue
        cosine, gap = (rows[name].less(WITHOUT_CONTRAST, metric) for metric in ("token_cosine", "gap_nats"))
        if cosine is not None and gap is not None:
            met = _all((_beyond_zero(cosine, -1), _no_cost(gap)))
            text = f"2-2-8: contrast at weight {weight} lowers the cosine between tokens, at equal or better perplexity"
            yield Claim(text, met, f"the cosine changes by {cosine.mean:+.4f}, the gap by {gap} nats")


def _beyond_zero(interval: Interval | None, sign: int) -> bool | None:
    """Tell whether the whole interval lies on that side of zero; None: there is none, and the mean does not deny it."""
    if interval is not None and interval.mean * sign <= 0:
        return False
    return None if interval is None or interval.low is None else interval.excludes_zero


def _no_cost(gap: Interval) -> bool | None:
    """Tell whether the gap is equal or smaller; None: it is larger by less than its interval, or of one seed."""
    if gap.low is None or (gap.mean > 0 and not gap.excludes_zero):
        return None
    return gap.mean <= 0


def _all(parts: Iterable[bool | None]) -> bool | None:
    """Tell whether all are so; one that is not decides, whatever is open."""
    answers = set(parts)
    return False if False in answers else None if None in answers else True
