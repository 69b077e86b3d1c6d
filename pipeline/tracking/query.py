"""Queries for registered models: what is asked of a model, what it is, and how far it is from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError
from pipeline.metrics import METRICS, larger_is_better, measure_of, metric_of

MIB = 2**20
VALIDATION = "validation_"  # before the name of a metric of that split, in MLflow


def of_text(name: str) -> bool:
    """Tell whether a metric differs between the splits, so that validation's is looked at."""
    metric = metric_of(name.removeprefix("teacher_"))
    return metric is not None and metric.of_text


@dataclass(frozen=True)
class Bound:
    """A bound on a metric, on validation if the splits differ in it; `scale` is how many of the metric's unit make one
    of the knob's."""

    knob: str
    metric: str
    bound: float
    at_most: bool
    scale: float = 1.0

    @property
    def split(self) -> str:
        """Return of which split the metric is, for people."""
        return " on validation" if of_text(self.metric) else ""

    def excess(self, value: float) -> float:
        """Return by which fraction of the bound a value of the metric is beyond it, 0 if it is not."""
        bound = self.bound * self.scale
        return max(0.0, value - bound if self.at_most else bound - value) / max(abs(bound), 1e-9)

    @property
    def server_side(self) -> str:
        """Return the bound as a condition of MLflow's search."""
        prefix = VALIDATION if of_text(self.metric) else ""
        return f"metrics.{prefix}{self.metric} {'<=' if self.at_most else '>='} {self.bound * self.scale!r}"


@dataclass(frozen=True)
class Query:
    """The constraints of a lookup; what is None does not matter. `at_least` and `at_most` bound any metric by name."""

    name: str | None = None
    task: str | None = None
    bits: str | None = None
    format: str | None = None
    alias: str | None = None
    max_size_mib: float | None = None
    max_perplexity: float | None = None
    min_accuracy: float | None = None
    min_rouge_l: float | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)

    def limits(self) -> list[Bound]:
        """Return the bounds that are asked for."""
        bounds = [
            ("max_size_mib", "packed_bytes", self.max_size_mib, MIB),
            ("max_perplexity", "perplexity", self.max_perplexity, 1.0),
            ("min_accuracy", "accuracy", self.min_accuracy, 1.0),
            ("min_rouge_l", "rougeL", self.min_rouge_l, 1.0),
        ]
        named = [Bound(k, m, b, not larger_is_better(m), scale) for k, m, b, scale in bounds if b is not None]
        named += [Bound(f"at_least {metric}", metric, bound, False) for metric, bound in self.at_least.items()]
        return named + [Bound(f"at_most {metric}", metric, bound, True) for metric, bound in self.at_most.items()]

    @property
    def measure(self) -> str:
        """Return what "best" means unless it is said: the task's own measure, else perplexity."""
        of_tasks = (limit.metric for limit in self.limits() if limit.metric in METRICS and METRICS[limit.metric].task)
        return next(of_tasks, measure_of(self.task or ""))


@dataclass(frozen=True)
class RegisteredModel:
    """A registered version, as `bitmill lookup --json` prints it; metrics under the names of the pipeline. `metrics`
    has those of the test split, to be reported, and sizes; `validation` those that models are found and ordered by."""

    name: str
    version: int
    aliases: tuple[str, ...]
    task: str
    bits: str
    quantizer: str
    size_mib: float | None
    metrics: dict[str, float] = field(repr=False)
    validation: dict[str, float] = field(repr=False)
    package_uri: str
    formats: tuple[str, ...]
    created_at: str  # ISO 8601, UTC

    def judged_by(self, name: str) -> float | None:
        """Return a metric of validation; one that no text shows in, such as a size, as it is; None: not measured."""
        value = self.size_mib if name == "size_mib" else (self.validation if of_text(name) else self.metrics).get(name)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class NearMiss:
    """A version that fails some constraints: one readable line for each, and how far it is in all."""

    model: RegisteredModel
    reasons: tuple[str, ...]
    distance: float


def ranked(models: Sequence[RegisteredModel], metric: str, required: bool) -> list[RegisteredModel]:
    """Sort by `metric`, on validation if the splits differ in it, then size, then newest; models without it last.
    ConfigError if `required` and all lack it."""
    if required and models and not any(model.judged_by(metric) is not None for model in models):
        known = ", ".join(sorted({name for model in models for name in model.metrics} | {"size_mib"}))
        raise ConfigError(f"--order-by {metric!r}: no matching model has that metric; valid: {known}")
    sign = -1.0 if larger_is_better(metric) else 1.0

    def rank(model: RegisteredModel) -> tuple[float, float]:
        value = model.judged_by(metric)
        return math.inf if value is None else sign * value, math.inf if model.size_mib is None else model.size_mib

    newest = sorted(models, key=lambda model: (model.created_at, model.version), reverse=True)
    return sorted(newest, key=rank)


def shortcomings(model: RegisteredModel, wanted: Query) -> list[tuple[str, float]]:
    """Return each failed constraint: a readable reason, and a distance (1 for what is another or missing)."""
    failed = []
    for knob in ("name", "task", "bits"):
        want, value = getattr(wanted, knob), getattr(model, knob)
        if want is not None and want != value:
            failed.append((f"{knob} is {value or 'none'}, wanted {want}", 1.0))
    for knob, want, values in (("format", wanted.format, model.formats), ("alias", wanted.alias, model.aliases)):
        if want is not None and want not in values:
            failed.append((f"{knob}: has {', '.join(values) or 'none'}, wanted {want}", 1.0))
    for limit in wanted.limits():
        value = model.judged_by(limit.metric)
        if value is None:
            failed.append((f"{limit.metric} was not measured{limit.split}", 1.0))
        elif (excess := limit.excess(value)) > 0:
            measured, side = f"{value / limit.scale:.4g}{limit.split}", "above" if limit.at_most else "below"
            failed.append((f"{measured} is {excess:.1%} {side} {limit.knob} {limit.bound:g}", excess))
    return failed
