"""What is asked of a registered model, what it is, and how far it is from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError

MIB = 2**20
HIGHER_IS_BETTER = ("accuracy", "rouge1", "rouge2", "rougeL", "top1_agreement", "ratio", "paper_ratio")
MEASURE_OF_TASK = {"summarization": "rougeL", "next_utterance": "accuracy"}


@dataclass(frozen=True)
class Limit:
    """A bound on a metric; `scale` is how many of the metric's unit make one of the knob's."""

    knob: str
    metric: str
    bound: float
    at_most: bool
    scale: float = 1.0

    def excess(self, metrics: dict[str, float]) -> float | None:
        """By how much, as a share of the bound, a model is beyond it: 0 if it is not, None if it was not measured."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return None
        bound = self.bound * self.scale
        beyond = value - bound if self.at_most else bound - value
        return max(0.0, beyond) / max(abs(bound), 1e-9)

    @property
    def server_side(self) -> str:
        return f"metrics.{self.metric} {'<=' if self.at_most else '>='} {self.bound * self.scale!r}"


@dataclass(frozen=True)
class Wanted:
    """The constraints of a lookup; what is None does not matter."""

    name: str | None = None
    task: str | None = None
    bits: str | None = None
    format: str | None = None
    alias: str | None = None
    max_size_mib: float | None = None
    max_perplexity: float | None = None
    min_accuracy: float | None = None
    min_rouge_l: float | None = None

    def limits(self) -> list[Limit]:
        bounds = [
            ("max_size_mib", "packed_bytes", self.max_size_mib, True, MIB),
            ("max_perplexity", "perplexity", self.max_perplexity, True, 1.0),
            ("min_accuracy", "accuracy", self.min_accuracy, False, 1.0),
            ("min_rouge_l", "rougeL", self.min_rouge_l, False, 1.0),
        ]
        return [Limit(k, metric, b, at_most, scale) for k, metric, b, at_most, scale in bounds if b is not None]

    @property
    def measure(self) -> str:
        """What "best" means unless it is said: the task's own measure, else perplexity."""
        if self.min_rouge_l is not None:
            return "rougeL"
        return "accuracy" if self.min_accuracy is not None else MEASURE_OF_TASK.get(self.task or "", "perplexity")


@dataclass(frozen=True)
class Found:
    """A registered version, as `bitmill lookup --json` prints it; metrics under the names of the pipeline."""

    name: str
    version: int
    aliases: tuple[str, ...]
    task: str
    bits: str
    quantizer: str
    size_mib: float | None
    metrics: dict[str, float] = field(repr=False)
    package_uri: str
    formats: tuple[str, ...]
    created_at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Miss:
    """A version that fails some constraints: one readable line for each, and how far it is in all."""

    found: Found
    reasons: tuple[str, ...]
    distance: float


def ordered(found: Sequence[Found], metric: str, strict: bool) -> list[Found]:
    """By `metric`, best first, equals by size, then the newest; models without it come last.

    Raises:
        ConfigError: `strict`, and none of them has it.
    """
    if strict and found and not any(_value(one, metric) is not None for one in found):
        known = ", ".join(sorted({name for one in found for name in one.metrics} | {"size_mib"}))
        raise ConfigError(f"--order-by {metric!r}: no matching model has that metric; valid: {known}")
    sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0

    def place(one: Found) -> tuple[float, float]:
        value = _value(one, metric)
        return math.inf if value is None else sign * value, math.inf if one.size_mib is None else one.size_mib

    newest = sorted(found, key=lambda one: (one.created_at, one.version), reverse=True)
    return sorted(newest, key=place)


def shortcomings(found: Found, wanted: Wanted) -> list[tuple[str, float]]:
    """Each failed constraint: a readable reason, and a distance (1 for what is another or missing)."""
    failed = [
        (f"{knob} is {value or 'none'}, wanted {want}", 1.0)
        for knob, want, value in (
            ("name", wanted.name, found.name),
            ("task", wanted.task, found.task),
            ("bits", wanted.bits, found.bits),
        )
        if want is not None and want != value
    ]
    for knob, want, values in (("format", wanted.format, found.formats), ("alias", wanted.alias, found.aliases)):
        if want is not None and want not in values:
            failed.append((f"{knob}: has {', '.join(values) or 'none'}, wanted {want}", 1.0))
    for limit in wanted.limits():
        excess = limit.excess(found.metrics)
        if excess is None:
            failed.append((f"{limit.metric} was not measured", 1.0))
        elif excess > 0:
            value, side = found.metrics[limit.metric] / limit.scale, "above" if limit.at_most else "below"
            failed.append((f"{value:.4g} is {excess:.1%} {side} {limit.knob} {limit.bound:g}", excess))
    return failed


def _value(found: Found, metric: str) -> float | None:
    value = found.size_mib if metric == "size_mib" else found.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None
