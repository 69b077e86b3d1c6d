"""Which trial of a sweep runs next, and what becomes of each: written down when it starts and when it ends.

A trial that has ended is never run again; one that was running when its driver died is the first to go on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.run import Config
from pipeline.config.sweep import Sweep
from pipeline.errors import BitmillError, ConfigError, NotRegisteredError
from pipeline.execution.engine import Engine
from pipeline.execution.ray_tune import GROUPS, LOSS, STEP
from pipeline.flow import run as flow
from pipeline.store.keys import canonical_json, step_key
from pipeline.store.records import ModelVersion, Package, Point, Report, Student, Trial
from pipeline.store.step_store import StepDir
from pipeline.sweep.sampler import suggestion
from pipeline.sweep.trials import label, scores, trial_config
from pipeline.tracking import runs
from pipeline.tracking.listener import Silent
from pipeline.tracking.outbox import LiveRun, Outbox

POINTS = "points"
SHARING = "sharing.json"
SUGGESTIONS = 20  # tries to be suggested what was not tried before
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """Values of a trial, and the plan that they make."""

    values: dict[str, Any]
    plan: flow.Plan

    @property
    def key(self) -> str:
        return self.plan.run_key


def candidate(base: Config, values: dict[str, Any]) -> Candidate:
    """Raises ConfigError for a combination that cannot work, with its values."""
    config = trial_config(base, values)
    try:
        return Candidate(values, flow.plan(config))
    except ConfigError as error:
        raise ConfigError(f"The trial {label(values)} cannot run: {error}") from error


def stored_trials(place: StepDir) -> dict[str, Trial]:
    """What is known of a sweep's trials, in the order in which they were started."""
    found = [json.loads(place.read(name)) for name in place.sizes("trials/") if name.endswith(".json")]
    return {entry["trial"]["key"]: Trial(**entry["trial"]) for entry in sorted(found, key=lambda entry: entry["index"])}


def stored_sharing(place: StepDir) -> dict[str, float]:
    """Worker-seconds that a sweep has spent on what its trials share."""
    try:
        return dict(json.loads(place.read(SHARING)))
    except (FileNotFoundError, NotADirectoryError):
        return {}


@dataclass
class Feed:
    """Gives Tune the next trial, hears of each, and registers what is done.

    `listed` are the trials known beforehand; with Optuna they are asked for one by one. `failures` says, by key, why
    a trial that is done could not be registered, or lost its workers: those are tried again by the same command.
    """

    base: Config
    sweep: Sweep
    key: str
    place: StepDir
    listed: Sequence[Candidate]
    outbox: Outbox
    advance: Advance
    trials: dict[str, Trial] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    capped: bool = False
    _running: dict[str, tuple[Candidate, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sharing = stored_sharing(self.place)

    @property
    def total(self) -> int:
        return len(self.listed) if self.sweep.search != "optuna" else self.sweep.at_most

    @property
    def ended_count(self) -> int:
        return sum(trial.status != "running" for trial in self.trials.values())

    @property
    def spent_s(self) -> float:
        """Worker-seconds of all trials so far, and of what they share."""
        begun = sum((time.monotonic() - start) * self._workers for _, start in self._running.values())
        return begun + sum(trial.worker_seconds for trial in self.trials.values()) + sum(self._sharing.values())

    def charge(self, name: str, worker_seconds: float) -> None:
        """Write down what shared steps took, which counts like a trial."""
        if worker_seconds:
            self._sharing[name] = self._sharing.get(name, 0.0) + worker_seconds
            self.place.write(SHARING, json.dumps(self._sharing).encode())

    @property
    def _workers(self) -> int:
        return max(1, self.base.resources.workers)

    def settle(self) -> bool:
        """Take in what needs no worker: trials whose package is there. Whether others are left to run."""
        for one in self.waiting:
            if one.plan.step(Package.stage).place.record(Package) is not None:  # there now, if not when it was planned
                self._register(one, self.trials.get(one.key) or self._started(one))
        return self.left

    @property
    def waiting(self) -> list[Candidate]:
        """Trials known beforehand that are to be run."""
        return [one for one in self.listed if self._waits(one.key)]

    @property
    def left(self) -> bool:
        """Whether there are trials to run."""
        asked = self.sweep.search == "optuna"
        return bool(self.waiting) or (asked and (len(self.trials) < self.total or any(map(self._waits, self.trials))))

    def _waits(self, key: str) -> bool:
        known = self.trials.get(key)
        return (known is None or known.status == "running") and key not in self._running and key not in self.failures

    def over(self) -> bool:
        """Whether the cap of worker-hours is used up."""
        cap = self.base.resources.max_worker_hours
        return cap is not None and self.spent_s >= cap * 3600

    def next(self) -> tuple[str, Any] | None:
        if self.over():
            self.capped = self.capped or self.left
            return None
        one = self._chosen()
        if one is None:
            return None
        self._keep(self.trials.get(one.key) or self._started(one))
        self._running[one.key] = (one, time.monotonic())
        return one.key, worker_plan(one.plan)

    def _chosen(self) -> Candidate | None:
        waiting = self.waiting
        if waiting:
            return waiting[0]
        if self.sweep.search != "optuna":
            return None
        left = next((trial for key, trial in self.trials.items() if self._waits(key)), None)
        return candidate(self.base, left.values) if left is not None else self._suggested()

    def _suggested(self) -> Candidate | None:
        for attempt in range(SUGGESTIONS * self.total):
            if len(self.trials) >= self.total:
                return None
            tried = [(trial.values, self.scores(trial)) for trial in self.trials.values()]
            values = suggestion(self.sweep, len(self.trials) + attempt * self.total, tried)
            try:
                one = candidate(self.base, values)
            except ConfigError as error:
                key = step_key("impossible", 1, {"values": canonical_json(values)}, {})
                if key not in self.trials:
                    bits = str(values.get("quant.bits", self.base.quant.bits))
                    self._keep(Trial(key=key, bits=bits, values=values, status="failed", failure=str(error)))
                continue
            if one.key not in self.trials:
                return one
        return None

    def scores(self, trial: Trial) -> tuple[float, ...] | None:
        if trial.status != "done" or trial.size is None:
            return None
        return scores(self.sweep.objectives, trial.teacher, trial.student, trial.size.packed_bytes)

    def reported(self, key: str, result: dict[str, Any]) -> None:
        one, _ = self._running[key]
        for stage, points in result.get(POINTS, ()):
            self.outbox.put(flow.target_of(one.plan, label(one.values), self.key), runs.prefixed(stage, points))
        if math.isfinite(result[LOSS]):
            trial = self.trials[key]
            last = {STEP: float(result[STEP]), LOSS: float(result[LOSS])}
            self.trials[key] = trial.model_copy(update={"last": last})
            self._say(f"{label(one.values)}: step {result[STEP]}, validation {result[LOSS]:.3f} nats")

    def ended(self, key: str, status: str, failure: str) -> None:
        if key not in self._running:  # it ended before, and what was said of it could not be kept
            return
        one, start = self._running.pop(key)
        trial = self.trials[key]
        trial = trial.model_copy(update={"seconds": trial.seconds + time.monotonic() - start, "failure": failure})
        if status == "lost":  # by no fault of its own: the same command tries it again
            self.failures[key] = failure
            self._keep(trial)
        elif status == "done":
            self._register(one, trial)
        else:
            self._fail(one, trial.model_copy(update={"status": status}))
        self._say(f"{label(one.values)}: {status}")

    def refuse(self, candidates: Sequence[Candidate], failure: str) -> None:
        """Trials that cannot run, for what they share cannot be made."""
        for one in candidates:
            trial = self.trials.get(one.key) or self._started(one)
            self._fail(one, trial.model_copy(update={"status": "failed", "failure": failure}))

    def _fail(self, one: Candidate, trial: Trial) -> None:
        """Write down a trial that was stopped or failed, here and in MLflow."""
        self._keep(trial)
        ending = "KILLED" if trial.status == "stopped" else "FAILED"
        self.outbox.put(flow.target_of(one.plan, label(one.values), self.key), [], ending)

    def _register(self, one: Candidate, trial: Trial) -> None:
        """Everything but the registration is done: read the results, and register the package from here."""
        config = one.plan.config
        alone = config.resources.model_copy(update={"workers": 0})  # in this process, by the trial's own keys
        plan = replace(flow.plan(config), config=config.model_copy(update={"resources": alone}))
        target = flow.target_of(plan, label(one.values), self.key)
        failure = ""
        try:
            version = plan.steps[-1].record
            if version is None:
                self.outbox.flush()
                runs.find_run(target)
            else:  # made by `compress`, or by another sweep, whose it remains
                runs.nest(target, runs.client_of(target.uri).get_run(version.run_id))
            flow.run(plan, LiveRun(Silent(), self.outbox, target))
        except NotRegisteredError as error:
            failure = str(error)
        except (BitmillError, *runs.FAULTS) as error:
            self.failures[one.key] = str(error)
            self._keep(trial)
            return
        self._keep(described(flow.plan(config), trial.model_copy(update={"status": "done", "failure": failure})))

    def _started(self, one: Candidate) -> Trial:
        places = {step.stage: step.place.key for step in one.plan.steps}
        bits = one.plan.config.quant.bits
        return Trial(key=one.key, bits=bits, values=one.values, status="running", workers=self._workers, places=places)

    def _keep(self, trial: Trial) -> None:
        """Write a trial down."""
        self.trials[trial.key] = trial
        index = list(self.trials).index(trial.key)
        entry = {"index": index, "trial": trial.model_dump(mode="json")}
        self.place.write(f"trials/{trial.key}.json", json.dumps(entry).encode())

    def _say(self, note: str) -> None:
        self.advance(self.ended_count, self.total, note)


def described(plan: flow.Plan, trial: Trial) -> Trial:
    """The trial with what the records of its steps say."""
    report, package, version = (plan.step(kind.stage).record for kind in (Report, Package, ModelVersion))
    found: dict[str, Any] = {"teacher": report.teacher, "student": report.student, "size": package.size}
    if version is not None:
        found["version"] = {"name": version.name, "version": version.version, "aliases": list(version.aliases)}
    return trial.model_copy(update=found)


def worker_plan(plan: flow.Plan) -> flow.Plan:
    """What a trial's worker runs: all but the registration; a single worker trains in the trial's own process.

    Several train by Ray Train, which must not start lost ones again by itself: when a trial is stopped and its
    placement group removed, it would make another that nobody knows of. Tune tries a trial that lost a worker again.
    """
    resources = plan.config.resources
    if resources.workers == 1:
        resources = resources.model_copy(update={"workers": 0})
    elif resources.workers > 1:
        resources = resources.model_copy(update={"max_failures": 0})
    return replace(plan, steps=plan.steps[:-1], config=plan.config.model_copy(update={"resources": resources}))


def run_trial(plan: flow.Plan, report: Callable[[dict[str, Any]], None]) -> None:
    """Run a trial up to its package, in its own process; each validation of the student is reported."""
    engine = Engine(plan.config.resources)
    try:
        flow.run(plan, Reporter(report, engine), engine=engine)
    finally:
        engine.close()


class Reporter(Silent):
    """An observer that gathers curves and reports them with each validation of the student."""

    def __init__(self, report: Callable[[dict[str, Any]], None], engine: Engine) -> None:
        self._report, self._engine = report, engine
        self._gathered: list[tuple[str, list[Point]]] = []

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        self._gathered.append((stage, list(points)))
        validated = [point for point in points if LOSS in point]
        if stage == Student.stage and validated:
            last = validated[-1]
            gathered, self._gathered = self._gathered, []
            self._report(
                {STEP: int(last["step"]), LOSS: last[LOSS], POINTS: gathered, GROUPS: sorted(self._engine.groups)}
            )
