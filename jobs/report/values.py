"""What a report shows, whatever it was read from."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.report.latency import Latency
from pipeline.metrics import minimised
from pipeline.retrain.decisions import Decision
from pipeline.retrain.ticks import Ticks, timeline
from pipeline.sweep.pareto import pareto_front


@dataclass(frozen=True)
class Module:
    """A quantized matrix as it ships; `gamma` is its outermost level over mean |w|."""

    name: str
    bits: int
    weights: int
    gamma: float | None = None
    zeros: float | None = None


@dataclass(frozen=True)
class Curve:
    """Losses of one training in nats, as (step, value)."""

    train: tuple[tuple[int, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a stage took. `seconds` is None if it was not noted."""

    stage: str
    seconds: float | None
    workers: int = 1


@dataclass(frozen=True)
class Shown:
    """One model, or the attempt at one. `metrics` are of the test split, for the table; `validation` has those that
    pictures and fronts are drawn by."""

    key: str
    label: str
    bits: str
    recipe: dict[str, Any]
    status: str  # done, stopped or failed
    metrics: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    suites: dict[str, Any] = field(default_factory=dict)  # what `evaluate.suites` measured, by suite
    packed_bytes: int | None = None
    latency: Latency | None = None
    ratio: float | None = None
    version: str = ""  # name/number
    aliases: tuple[str, ...] = ()
    package_uri: str = ""
    package_key: str = ""
    curve: Curve = Curve()
    modules: tuple[Module, ...] = ()
    costs: tuple[Cost, ...] = ()  # of its own stages
    failure: str = ""

    @property
    def token_ms(self) -> float | None:
        """Return milliseconds a token, where they were measured."""
        return None if self.latency is None else self.latency.median_ms

    @property
    def command(self) -> str:
        """Return the command that gets it."""
        if self.version:
            return f"bitmill pull {shlex.quote(self.version)} {shlex.quote(self.version.replace('/', '-'))}"
        return f"bitmill pull {shlex.quote(self.package_uri)} {self.key[:8]}" if self.package_uri else ""


Costing = Callable[[Shown], float | None]  # what a model costs its user: bytes, or milliseconds a token


@dataclass(frozen=True)
class Mark:
    """A reference in the picture that is not one of the models."""

    label: str
    packed_bytes: float
    value: float


@dataclass(frozen=True)
class Content:
    """A whole report. `measure` is the metric of the picture, in which a model is compared with its teacher, on
    validation; `teacher` has the teacher's metrics of the test split."""

    title: str
    kind: str  # run or sweep
    key: str
    measure: str
    protocol: str
    teacher_bytes: int
    teacher_parameters: int
    teacher: dict[str, float]
    teacher_validation: dict[str, float]
    shown: tuple[Shown, ...]
    shared_costs: tuple[Cost, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    chosen: frozenset[str] | None = None  # keys of the front by objectives other than these two
    decisions: tuple[Decision, ...] = ()  # on the name that a run was registered under, the first one first
    ticks: tuple[Ticks, ...] = ()  # of that name, that decided nothing

    @property
    def timeline(self) -> list[Decision | Ticks]:
        """Return decisions and ticks by time."""
        return timeline(self.decisions, self.ticks)

    @property
    def best(self) -> list[Shown]:
        """Return the models that no other beats, in bytes and measure unless a sweep had other objectives; by bytes."""
        if self.chosen is None:
            return self.pareto_front(lambda model: model.packed_bytes)
        chosen = [model for model in self.shown if model.key in self.chosen]
        return sorted(chosen, key=lambda model: (model.packed_bytes or 0, model.label))

    def pareto_front(self, cost: Costing) -> list[Shown]:
        """Return the models that no other beats in a cost and the measure on validation, by that cost."""
        done = [model for model in self.shown if model.status == "done" and self.has(model, cost)]
        best = pareto_front([(cost(model), minimised(self.measure, model.validation[self.measure])) for model in done])
        return sorted((done[index] for index in best), key=lambda model: (cost(model) or 0, model.label))

    def has(self, model: Shown, cost: Costing) -> bool:
        """Tell whether a model has both a cost and the measure."""
        return cost(model) is not None and self.measure in model.validation

    @property
    def timed(self) -> bool:
        """Tell whether the latency of any model was measured."""
        return any(model.latency is not None for model in self.shown)

    @property
    def metrics(self) -> list[str]:
        """Return the metrics that any model has, the measure first."""
        return list(dict.fromkeys([self.measure, *(name for model in self.shown for name in model.metrics)]))


def worker_hours(costs: Sequence[Cost]) -> float:
    """Sum the hours of all workers; what was not noted counts as none."""
    return sum((cost.seconds or 0.0) * max(1, cost.workers) for cost in costs) / 3600
