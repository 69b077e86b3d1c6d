"""What is claimed of the presets, checked against a table of the bench: each claim with its number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jobs.bench.rows import BEST, LIGHT_CONTRAST, MOST_OF_PAPERS, PAPER, SMALLEST, WITHOUT_CONTRAST, named
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
    gap, over = best.gap_interval, math.expm1(best.gap_nats)
    if gap.low is not None and gap.high is not None:
        low, high = math.expm1(gap.low), math.expm1(gap.high)
        number = f"{over:+.2%} [{low:+.2%}, {high:+.2%}]"
    else:  # of one seed, or validation left each seed's student at the start, which is the same
        high, number = over if best.seeds > 1 else math.inf, f"{over:+.2%}"
    return Claim(text, False if over > most else True if high <= most else None, number)


def _narrow(rows: dict[str, Line]) -> Iterator[Claim]:
    for preset, rivals in ((BEST, "row"), (SMALLEST, "ternary row")):
        if preset not in rows or PAPER not in rows:
            continue
        others = [r for key, r in rows.items() if key != preset and (preset == BEST or named(key).ternary_at(r.bits))]
        nearest = min(others, key=lambda row: row.gap_nats)
        least = _all(_beyond_zero(row.less(preset), 1) for row in others)
        number = f"{rows[preset].gap_nats:.4f} nats; next of {len(others)}, {nearest.row}, {nearest.gap_nats:.4f}"
        yield Claim(f"2-2-8: {preset} has the smallest gap of each {rivals}, intervals without zero", least, number)
        less, most = rows[preset].less_share, MOST_OF_PAPERS[preset]
        if less is not None:
            text = f"2-2-8: the gap of {preset} is at most {most:g} of the paper's recipe, interval without zero"
            share = rows[preset].gap_nats / (rows[PAPER].gap_nats or math.nan)
            met = None if less.mean < 0 and not less.excludes_zero else less.mean < 0
            yield Claim(text, met, f"{share:.3f}; less {most:g} of it {less} nats")


def _contrast(rows: dict[str, Line]) -> Iterator[Claim]:
    """Check what the contrastive loss is for: representations of different tokens less alike, perplexity no worse."""
    for name in (PAPER, LIGHT_CONTRAST):
        if name not in rows:
            continue
        weight = named(name).sections["distill"]["contrast_weight"]
        cosine, gap = (rows[name].less(WITHOUT_CONTRAST, metric) for metric in ("token_cosine", "gap_nats"))
        if cosine is not None and gap is not None:
            met = _all((_beyond_zero(cosine, -1), _no_cost(gap)))
            text = f"2-2-8: contrast at weight {weight} lowers the cosine between tokens, at equal or better perplexity"
            yield Claim(text, met, f"the cosine changes by {cosine.mean:+.4f}, the gap by {gap.mean:+.4f} nats")


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
