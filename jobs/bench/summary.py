"""Scores to a table: means over seeds, and 95 % intervals of the differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from scipy import stats

from jobs.bench.rows import BEST, PAPER, SMALLEST
from jobs.bench.trials import Score
from pipeline.front import front as non_dominated


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences in nats and its 95 % interval (Student's t); of one pair there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Line:
    """One row of the table at one width."""

    row: str
    bits: str
    rate: float
    seeds: int
    gap_nats: float
    kl_nats: float
    top1_agreement: float
    token_cosine: float
    packed_bytes: int
    from_paper: Interval | None
    from_best: Interval | None
    from_smallest: Interval | None

    def document(self) -> dict[str, Any]:
        return asdict(self)


def paired(left: Sequence[Score], right: Sequence[Score]) -> Interval | None:
    """Gap of `left` less gap of `right` over the seeds both have."""
    others = {score.seed: score.gap_nats for score in right}
    differences = [score.gap_nats - others[score.seed] for score in left if score.seed in others]
    if not differences:
        return None
    if len(differences) == 1 or len(set(differences)) == 1:
        return Interval(differences[0])
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return Interval(fmean(differences), float(low), float(high))


def lines(scores: Sequence[Score], bits: str) -> list[Line]:
    """The table at one width, from the largest gap to the smallest."""
    rows: dict[str, list[Score]] = {}
    for score in scores:
        if score.bits == bits:
            rows.setdefault(score.row, []).append(score)
    found = [_line(name, rows) for name in rows]
    return sorted(found, key=lambda line: -line.gap_nats)


def _line(name: str, rows: dict[str, list[Score]]) -> Line:
    of_row = rows[name]
    untrained = len(of_row) == 1 and len(rows.get(PAPER, ())) > 1

    def difference(reference: str) -> Interval | None:
        if reference == name or reference not in rows:
            return None
        ours = [of_row[0].model_copy(update={"seed": s.seed}) for s in rows[reference]] if untrained else of_row
        return paired(ours, rows[reference])

    return Line(
        row=name,
        bits=of_row[0].bits,
        rate=of_row[0].rate,
        seeds=len(of_row),
        gap_nats=fmean(s.gap_nats for s in of_row),
        kl_nats=fmean(s.student["kl_nats"] for s in of_row),
        top1_agreement=fmean(s.student["top1_agreement"] for s in of_row),
        token_cosine=fmean(s.token_cosine for s in of_row),
        packed_bytes=of_row[0].packed_bytes,
        from_paper=difference(PAPER),
        from_best=difference(BEST),
        from_smallest=difference(SMALLEST),
    )


HEADER = ("recipe", "rate", "gap, nats", "less paper's", "less best's", "KL, nats", "same top token", "bytes")


def cells(line: Line) -> tuple[str, ...]:
    return (
        line.row,
        f"{line.rate:g}",
        f"{line.gap_nats:.4f}",
        _interval(line.from_paper),
        _interval(line.from_best),
        f"{line.kl_nats:.4f}",
        f"{line.top1_agreement:.1%}",
        f"{line.packed_bytes:,}",
    )


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.4f}"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def markdown(lines: Sequence[Line]) -> str:
    rows = [HEADER, tuple("---" for _ in HEADER), *(cells(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def front(lines: Sequence[Line]) -> list[Line]:
    """The rows that no other row beats in both bytes and gap, by bytes."""
    best = non_dominated([(line.packed_bytes, line.gap_nats) for line in lines])
    return sorted((lines[index] for index in best), key=lambda line: (line.packed_bytes, line.row))
