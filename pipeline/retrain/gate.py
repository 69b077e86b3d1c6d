"""The gate: what a challenger must show against the champion. Every rule says its numbers, passed or not.

Champion and challenger meet on the challenger's test split, which neither ever trained on, and which no checkpoint was
chosen by: validation chose the challenger's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.bootstrap import ratio_interval
from pipeline.config.base import Closed
from pipeline.config.retrain import PromotionGate
from pipeline.metrics import METRICS, bounded, gap_nats, larger_is_better, measure_of
from pipeline.store.records import Contest, Evaluation, Package
from pipeline.store.step_store import FinishedStep

MIB = 2**20
LANGUAGE = "perplexity"  # whose gain is of its logarithm: nats a token


class Gain(Closed):
    """By how much the challenger is better, over some documents; `low` is what other documents would have given at
    least, at the gate's confidence (None: fewer than two, or no difference). `left_out` had trained one of the two, or
    chosen its checkpoint; `gone` had measured the champion, and are there no more."""

    mean: float
    low: float | None
    documents: int
    left_out: int = 0
    gone: int = 0


class Ruling(Closed):
    """A rule, whether the challenger passed it, and by what numbers."""

    rule: str
    passed: bool
    said: str
    numbers: dict[str, float] = {}


@dataclass(frozen=True)
class Evidence:
    """What is measured of a challenger beside its scores: milliseconds of a token (None: not measured), and of each
    format that it was exported to, why it cannot be kept (empty: it was verified)."""

    latency_ms: float | None = None
    exports: Mapping[str, str] = field(default_factory=dict)


def gains(contest: FinishedStep[Contest], task: str, confidence: float) -> dict[str, Gain]:
    """Return the gain over all documents and, where they are known, over those that are new to the test split."""
    documents = contest.read_json(Contest.DOCUMENTS)
    measure, fresh = measure_of(task), documents["fresh"]
    if measure == LANGUAGE:
        better = np.subtract(documents["champion"], documents["challenger"])
        weights: NDArray[np.float64] = np.asarray(documents["tokens"], np.float64)
    else:
        rows = contest.read_json(Contest.ROWS)
        better = np.subtract(rows["challenger"][measure], rows["champion"][measure])
        better = better if larger_is_better(measure) else -better
        weights = np.ones(len(better))
        fresh = None if fresh is None else [fresh[place] for place in rows["documents"]]
    whole = _gain(better, weights, confidence)
    gained = {"whole": whole.model_copy(update={name: documents[name] for name in ("left_out", "gone")})}
    if fresh is not None and any(fresh):
        chosen = np.asarray(fresh, bool)
        gained["fresh"] = _gain(better[chosen], weights[chosen], confidence)
    return gained


def _gain(better: NDArray[np.float64], weights: NDArray[np.float64], confidence: float) -> Gain:
    """Return the gain with its one-sided bound: the lower end of a two-sided interval that leaves out as much on each
    side, moved away from the mean by what few documents hide of their spread (the expanded percentile interval of
    Hesterberg 2015, section 3.4)."""
    from scipy import stats  # takes a second, which a tick without new data has no use for

    ends, count = ratio_interval(better, weights, 2 * confidence - 1), len(better)
    mean = float(better.sum() / weights.sum())
    if ends is None:
        return Gain(mean=mean, low=None, documents=count)
    hidden = math.sqrt(count / (count - 1)) * stats.t.ppf(confidence, count - 1) / stats.norm.ppf(confidence)
    return Gain(mean=mean, low=mean - float(hidden) * (mean - ends[0]), documents=count)


def judge(
    gate: PromotionGate,
    task: str,
    gained: Mapping[str, Gain],
    evaluation: Evaluation,
    package: Package,
    evidence: Evidence,
) -> tuple[Ruling, ...]:
    """Return what each rule of the gate says."""
    rulings = [_better(gate, measure_of(task), gained)]
    if gate.max_size_mib is not None:
        mib = package.size.packed_bytes / MIB
        rulings.append(_at_most("max_size_mib", "packed MiB", mib, gate.max_size_mib))
    if gate.max_perplexity_ratio is not None:
        ratio = math.exp(gap_nats(**evaluation.validation))
        said = "times the perplexity of its teacher on validation"
        rulings.append(_at_most("max_perplexity_ratio", said, ratio, gate.max_perplexity_ratio))
    rulings += [_bounded(*bound, evaluation.validation["student"]) for bound in gate.bounds]
    if gate.max_latency_ms is not None:
        if evidence.latency_ms is None:
            said = "no latency: the packed runtime does not run this model"
            rulings.append(Ruling(rule="max_latency_ms", passed=False, said=said))
        else:
            rulings.append(_at_most("max_latency_ms", "ms a token", evidence.latency_ms, gate.max_latency_ms))
    rulings += _exported(gate.exports, evidence)
    return tuple(rulings)


def _better(gate: PromotionGate, measure: str, gained: Mapping[str, Gain]) -> Ruling:
    whole, fresh = gained["whole"], gained.get("fresh")
    unit = "nats a token" if measure == LANGUAGE else measure
    surely = "not known" if whole.low is None else f"at least {whole.low:+.4f} at {gate.confidence:.0%}"
    said = f"better than the champion by {whole.mean:+.4f} {unit} on {whole.documents:,} documents, {surely}"
    numbers: dict[str, float] = {"mean": whole.mean, "documents": whole.documents, "least": gate.min_gain}
    if whole.low is not None:
        numbers["low"] = whole.low
    if fresh is not None:
        said += f"; by {fresh.mean:+.4f} on the {fresh.documents:,} new ones"
        numbers |= {"fresh_mean": fresh.mean, "fresh_documents": fresh.documents}
    if whole.gone:
        said += f"; {whole.gone:,} that measured the champion are there no more (one that was changed is a new one)"
    if whole.left_out:
        said += f"; {whole.left_out:,} that trained one of the two, or chose its checkpoint, were left out"
    passed = whole.low is not None and whole.low > gate.min_gain
    return Ruling(rule="min_gain", passed=passed, said=f"{said}; wanted more than {gate.min_gain:g}", numbers=numbers)


def _at_most(rule: str, unit: str, value: float, most: float) -> Ruling:
    numbers = {"value": value, "most": most}
    return Ruling(rule=rule, passed=value <= most, said=f"{value:.4g} {unit}; at most {most:g}", numbers=numbers)


def _bounded(rule: str, metric: str, bound: float, scores: Mapping[str, float]) -> Ruling:
    passed, said = bounded(rule, metric, bound, scores)
    numbers = {"bound": bound} | ({metric: scores[metric]} if metric in scores else {})
    return Ruling(rule=f"{rule}: {metric}", passed=passed, said=said, numbers=numbers)


def _exported(formats: Sequence[str], evidence: Evidence) -> Iterator[Ruling]:
    for name in formats:
        flaw = evidence.exports.get(name, "it was not exported")
        yield Ruling(rule=f"exports: {name}", passed=not flaw, said=flaw or f"the {name} export was verified")


def deciding(rulings: Sequence[Ruling]) -> Ruling:
    """Return the rule that decided: the first that was failed, else that of the gain."""
    return next((ruling for ruling in rulings if not ruling.passed), rulings[0])


def better_on_validation(task: str, scores: Sequence[dict[str, Any]]) -> int:
    """Return the index of the challenger that validation finds best by the task's measure."""
    measure = measure_of(task)
    sign = -1 if METRICS[measure].larger_is_better else 1
    return min(range(len(scores)), key=lambda index: sign * scores[index][measure])
