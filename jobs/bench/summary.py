"""Scores to a table: means over seeds, and 95 % intervals of the differences paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy import stats

from jobs.bench.rows import BEST, MOST_OF_PAPERS, PAPER, ROWS, SMALLEST, WITHOUT_CONTRAST
from jobs.bench.students import Score
from pipeline.sweep.pareto import pareto_front


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, in nats, and its 95 % interval (Student's t); of one seed, or equal ones, there is none."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Tell whether there is an interval, and zero lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        between = "" if self.low is None or self.high is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f}{between}"


UNTRAINED = frozenset(row.name for row in ROWS if not row.trained)
REFERENCES = (PAPER, BEST, SMALLEST, WITHOUT_CONTRAST)
COMPARED: dict[str, Callable[[Score], float]] = {
    "gap_nats": lambda score: score.gap_nats,
    "kl_nats": lambda score: score.student["kl_nats"],
    "top1_agreement": lambda score: score.student["top1_agreement"],
    "token_cosine": lambda score: score.token_cosine,
}


@dataclass(frozen=True)
class Line:
    """One row of the table at one width: means over seeds, and each metric's paired difference from reference rows."""

    row: str
    bits: str
    rate: float
    tried: tuple[float, ...]  # by its search, from the lowest
    seeds: int
    gap_nats: float
    kl_nats: float
    top1_agreement: float
    token_cosine: float
    packed_bytes: int
    gap_interval: Interval
    differences: dict[str, dict[str, Interval]]  # by row of `REFERENCES`, then by metric
    less_share: Interval | None = None  # the gap less the share of the paper's that `MOST_OF_PAPERS` allows it

    def less(self, reference: str, metric: str = "gap_nats") -> Interval | None:
        """Return the paired difference of a metric from that of a reference row; None for that row itself."""
        return self.differences.get(reference, {}).get(metric)


def paired(
    left: Sequence[Score], right: Sequence[Score], metric: str = "gap_nats", share: float = 1.0
) -> Interval | None:
    """Return the metric of `left` less that share of `right`'s over the seeds both have."""
    value = COMPARED[metric]
    others = {score.seed: share * value(score) for score in right}
    differences = [value(score) - others[score.seed] for score in left if score.seed in others]
    return interval(differences) if differences else None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval (Student's t)."""
    if len(set(values)) == 1:
        return Interval(values[0])
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Interval(fmean(values), float(low), float(high))


def lines(scores: Sequence[Score], bits: str, search: Sequence[Mapping[str, Any]] = ()) -> list[Line]:
    """Return the table at one width, the largest gap first. `search` has row, bits and rate of all tried."""
    rows: dict[str, list[Score]] = {}
    for score in scores:
        if score.bits == bits:
            rows.setdefault(score.row, []).append(score)
    tried = {(entry["row"], entry["rate"]) for entry in search if entry["bits"] == bits}
    table = [_line(name, rows, tuple(sorted(rate for row, rate in tried if row == name))) for name in rows]
    return sorted(table, key=lambda line: -line.gap_nats)


def _line(name: str, rows: dict[str, list[Score]], tried: tuple[float, ...]) -> Line:
    of_row = rows[name]
    differences: dict[str, dict[str, Interval]] = {}
    for reference in REFERENCES:
        if reference != name and reference in rows:
            others, ours = rows[reference], of_row
            if name in UNTRAINED:  # the same for each seed
                ours = [of_row[0].model_copy(update={"seed": score.seed}) for score in others]
            compared = {metric: paired(ours, others, metric) for metric in COMPARED}
            differences[reference] = {metric: interval for metric, interval in compared.items() if interval is not None}
    return Line(
        row=name,
        bits=of_row[0].bits,
        rate=of_row[0].rate,
        tried=tried,
        seeds=len(of_row),
        packed_bytes=of_row[0].packed_bytes,
        gap_interval=interval([score.gap_nats for score in of_row]),
        differences=differences,
        less_share=paired(of_row, rows.get(PAPER, ()), share=MOST_OF_PAPERS[name]) if name in MOST_OF_PAPERS else None,
        **{metric: fmean(map(value, of_row)) for metric, value in COMPARED.items()},
    )


HEADER = (
    *("recipe", "rate", "seeds", "bytes", "gap, nats", "less paper's", "less best's", "less smallest's"),
    *("KL, nats", "KL less paper's", "same top token", "less paper's share", "token cosine", "less paper's cosine"),
)
SHORT_HEADER = ("recipe", "rate", "bytes", "gap, nats", "less paper's", "KL, nats", "same top token")


def short_cells(line: Line) -> tuple[str, ...]:
    """Return the cells that a terminal has room for."""
    less = line.less(PAPER)
    return (
        line.row,
        "" if line.row in UNTRAINED else f"{line.rate:g}{_end(line, ' v', ' ^')}",
        f"{line.packed_bytes:,}",
        f"{line.gap_nats:.4f}",
        "" if less is None else str(less),
        f"{line.kl_nats:.4f}",
        f"{line.top1_agreement:.1%}",
    )


def cells(line: Line) -> tuple[str, ...]:
    """Return the cells of `HEADER`."""
    return (
        line.row,
        _rate(line),
        str(line.seeds),
        f"{line.packed_bytes:,}",
        f"{line.gap_nats:.4f}",
        *(_interval(line.less(reference)) for reference in (PAPER, BEST, SMALLEST)),
        f"{line.kl_nats:.4f}",
        _interval(line.less(PAPER, "kl_nats")),
        f"{line.top1_agreement:.4f}",
        _interval(line.less(PAPER, "top1_agreement")),
        f"{line.token_cosine:.4f}",
        _interval(line.less(PAPER, "token_cosine")),
    )


def _rate(line: Line) -> str:
    """Return the rate that validation chose, of how many, with a mark where it is the lowest or highest of them."""
    if line.row in UNTRAINED:
        return ""
    end = _end(line, "the lowest ", "the highest ")
    return f"{line.rate:g}" + (f" ({end}of {len(line.tried)})" if line.tried else "")


def _end(line: Line, lowest: str, highest: str) -> str:
    """Return which end of what its search tried the rate is; nothing between them, or where only one was tried."""
    ends = {line.tried[0]: lowest, line.tried[-1]: highest} if len(line.tried) > 1 else {}
    return ends.get(line.rate, "")


def _interval(interval: Interval | None) -> str:
    """Return an interval as text, in bold where it excludes zero."""
    return "" if interval is None else f"**{interval}**" if interval.excludes_zero else str(interval)


def markdown(lines: Sequence[Line]) -> str:
    """Return a table of all columns in Markdown."""
    rows = [HEADER, tuple("---" for _ in HEADER), *(cells(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def pareto_lines(lines: Sequence[Line]) -> list[Line]:
    """Return the rows that no other row beats in both bytes and gap, by bytes."""
    best = pareto_front([(line.packed_bytes, line.gap_nats) for line in lines])
    return sorted((lines[index] for index in best), key=lambda line: (line.packed_bytes, line.row))
