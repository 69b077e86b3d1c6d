"""Scores to a table: means over seeds, and 95 % intervals of the differences paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from scipy import stats

from jobs.bench.documents import Documents, bootstrapped
from jobs.bench.rows import BEST, REFERENCE, ROWS, SMALLEST, WITHOUT_CONTRAST, Key
from jobs.bench.students import Score
from pipeline.sweep.pareto import pareto_front


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with two 95 % intervals: over the seeds, which draw the order of the data (Student's t; of one
    seed, or equal ones, there is none), and over the documents of the test split (a bootstrap; of gaps alone)."""

    mean: float
    low: float | None = None
    high: float | None = None
    documents: tuple[float, float] | None = None

    @property
    def ends(self) -> list[tuple[float, float]]:
        """Return the intervals there are, that over seeds first."""
        over_seeds = [(self.low, self.high)] if self.low is not None and self.high is not None else []
        return [*over_seeds, *filter(None, [self.documents])]

    @property
    def excludes_zero(self) -> bool:
        """Tell whether there is an interval over seeds, and it and that over documents lie on the same side of zero."""
        beyond = all(low > 0 for low, _ in self.ends) or all(high < 0 for _, high in self.ends)
        return self.low is not None and beyond

    def __str__(self) -> str:
        return self.shown(lambda nats: f"{nats:+.4f}")

    def shown(self, form: Callable[[float], str]) -> str:
        """Return the mean, [the interval over seeds] and {that over documents}."""
        over_seeds = f" [{form(self.low)}, {form(self.high)}]" if self.low is not None and self.high is not None else ""
        over_documents = f" {{{', '.join(map(form, self.documents))}}}" if self.documents is not None else ""
        return f"{form(self.mean)}{over_seeds}{over_documents}"


UNTRAINED = frozenset(row.name for row in ROWS if not row.trained)
REFERENCES = (REFERENCE, BEST, SMALLEST, WITHOUT_CONTRAST)
GAP = "gap_nats"
COMPARED: dict[str, Callable[[Score], float]] = {
    GAP: lambda score: score.gap_nats,
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
    contrast_weight: float
    tried: tuple[float, ...]  # rates of its search, from the lowest
    seeds: int
    gap_nats: float
    kl_nats: float
    top1_agreement: float
    token_cosine: float
    packed_bytes: int
    gap_interval: Interval
    differences: dict[str, dict[str, Interval]]  # by row of `REFERENCES`, then by metric

    def less(self, reference: str, metric: str = GAP) -> Interval | None:
        """Return the paired difference of a metric from that of a reference row; None for that row itself."""
        return self.differences.get(reference, {}).get(metric)


def paired(left: Sequence[Score], right: Sequence[Score], metric: str = GAP) -> Interval | None:
    """Return the metric of `left` less `right`'s over the seeds both have."""
    value = COMPARED[metric]
    others = {score.seed: value(score) for score in right}
    differences = [value(score) - others[score.seed] for score in left if score.seed in others]
    return interval(differences) if differences else None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval (Student's t)."""
    if len(set(values)) == 1:
        return Interval(values[0])
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Interval(fmean(values), float(low), float(high))


def lines(
    scores: Sequence[Score], bits: str, documents: Mapping[Key, Documents], search: Sequence[Mapping[str, Any]] = ()
) -> list[Line]:
    """Return the table at one width, the largest gap first. `documents` has those of each row, averaged over seeds;
    `search` has row, bits and rate of all tried."""
    rows: dict[str, list[Score]] = {}
    for score in scores:
        if score.bits == bits:
            rows.setdefault(score.row, []).append(score)
    texts = {row: documents[row, bits] for row in rows if (row, bits) in documents}
    tried = {(entry["row"], entry["rate"]) for entry in search if entry["bits"] == bits}
    table = [_line(name, rows, texts, tuple(sorted(rate for row, rate in tried if row == name))) for name in rows]
    return sorted(table, key=lambda line: -line.gap_nats)


def _line(name: str, rows: Mapping[str, list[Score]], texts: Mapping[str, Documents], tried: tuple[float, ...]) -> Line:
    of_row, text = rows[name], texts.get(name)
    gap = interval([score.gap_nats for score in of_row])
    return Line(
        row=name,
        bits=of_row[0].bits,
        rate=of_row[0].rate,
        contrast_weight=of_row[0].contrast_weight,
        tried=tried,
        seeds=len(of_row),
        packed_bytes=of_row[0].packed_bytes,
        gap_interval=gap if text is None else replace(gap, documents=bootstrapped(text)),
        differences={
            reference: _differences(name, reference, rows, texts)
            for reference in REFERENCES
            if reference != name and reference in rows
        },
        **{metric: fmean(map(value, of_row)) for metric, value in COMPARED.items()},
    )


def _differences(
    name: str, reference: str, rows: Mapping[str, list[Score]], texts: Mapping[str, Documents]
) -> dict[str, Interval]:
    """Return each metric of a row less a reference's."""
    ours, others = rows[name], rows[reference]
    if name in UNTRAINED:  # the same for each seed
        ours = [ours[0].model_copy(update={"seed": score.seed}) for score in others]
    compared = {metric: paired(ours, others, metric) for metric in COMPARED}
    differences = {metric: interval for metric, interval in compared.items() if interval is not None}
    if GAP in differences and name in texts and reference in texts:
        differences[GAP] = replace(differences[GAP], documents=bootstrapped(texts[name], texts[reference]))
    return differences


HEADER = (
    *("recipe", "rate", "seeds", "bytes", "gap, nats", "less reference's", "less best's", "less smallest's"),
    *("KL, nats", "KL less reference's", "same top token", "less reference's share"),
    *("token cosine", "less reference's cosine"),
)
SHORT_HEADER = ("recipe", "rate", "bytes", "gap, nats", "less reference's", "KL, nats", "same top token")


def short_cells(line: Line) -> tuple[str, ...]:
    """Return the cells that a terminal has room for."""
    less = line.less(REFERENCE)
    return (
        line.row,
        "" if line.row in UNTRAINED else f"{line.rate:g}{_end(line, ' v', ' ^')}{_contrast(line)}",
        f"{line.packed_bytes:,}",
        f"{line.gap_nats:.4f}",
        "" if less is None else str(less).replace(" {", "\n{"),
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
        *(_interval(line.less(reference)) for reference in (REFERENCE, BEST, SMALLEST)),
        f"{line.kl_nats:.4f}",
        _interval(line.less(REFERENCE, "kl_nats")),
        f"{line.top1_agreement:.4f}",
        _interval(line.less(REFERENCE, "top1_agreement")),
        f"{line.token_cosine:.4f}",
        _interval(line.less(REFERENCE, "token_cosine")),
    )


def _rate(line: Line) -> str:
    """Return the rate that validation chose, of how many, with a mark where it is the lowest or highest of them."""
    if line.row in UNTRAINED:
        return ""
    end = _end(line, "the lowest ", "the highest ")
    return f"{line.rate:g}" + (f" ({end}of {len(line.tried)})" if line.tried else "") + _contrast(line)


def _contrast(line: Line) -> str:
    """Return the weight of the contrastive loss, for the row whose search chooses it."""
    return f", contrast {line.contrast_weight:g}" if line.row == REFERENCE else ""


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
