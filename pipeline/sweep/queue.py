"""Which trial of a sweep runs next, and what becomes of each: written down when it starts and when it ends.

A trial that has ended is never run again; one that was running when its driver died is the first to go on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

from pipeline.config.laid_over import label, laid_over
from pipeline.config.run import Config
from pipeline.config.sweep import Sweep
from pipeline.errors import BitmillError, ConfigError, NotRegisteredError
from pipeline.execution.engine import Engine
from pipeline.execution.ray_tune import GROUPS, LOSS, STEP
from pipeline.flow import preflight
from pipeline.flow.plan import Once, RunPlan, plan_run, target_of
from pipeline.flow.run import run_plan
from pipeline.models.build import skeleton
from pipeline.package.size import layout
from pipeline.store.keys import canonical_json, step_key
from pipeline.store.pieces import Pieces
from pipeline.store.records import Advance, Evaluation, ModelVersion, Package, Point, Student, Teacher, Trial
from pipeline.store.step_store import StepDir
from pipeline.sweep.halving import Halving
from pipeline.sweep.sampler import sample_values
from pipeline.sweep.trials import scores
from pipeline.tracking import runs
from pipeline.tracking.listener import SilentListener
from pipeline.tracking.mlflow_listener import MlflowListener
from pipeline.tracking.outbox import Outbox

POINTS = "points"
TRIALS, SHARED = "trials/", "shared/"  # folders of the sweep's step
SECONDS = "seconds"
SAMPLES_A_TRIAL = 20  # tries to sample values that were not tried before


@dataclass(frozen=True)
class PlannedTrial:
    """Values of a trial, and the plan that they make."""

    values: dict[str, Any]
    plan: RunPlan

    @property
    def key(self) -> str:
        """Return the run key, which names the trial."""
        return self.plan.run_key

    @cached_property
    def packed_bytes(self) -> int:
        """Return the bytes of its weights, packed as it packs them, from shapes alone."""
        pinned, quant, encoding = self.plan.pinned, self.plan.config.quant, self.plan.config.pack.encoding
        shape = layout(skeleton(preflight.model_config(pinned)), pinned.family, quant, encoding)
        return shape.packed_bytes({name: quant.spec().weight_bits(name, role) for name, role in shape.roles.items()})


def plan_trial(base: Config, values: dict[str, Any], once: Once | None = None) -> PlannedTrial:
    """Plan the run of a trial. Raises ConfigError for a combination that cannot work, with its values."""
    config = laid_over(base, values)
    try:
        return PlannedTrial(values, plan_run(config, once=once))
    except ConfigError as error:
        raise ConfigError(f"The trial {label(values)} cannot run: {error}") from error


def stored_trials(step_dir: StepDir) -> dict[str, Trial]:
    """Return what is known of a sweep's trials, in the order in which they were started."""
    return {trial.key: trial for _, trial in sorted(Pieces(step_dir, TRIALS).all(_entry), key=itemgetter(0))}


def _entry(document: Any) -> tuple[int, Trial]:
    return int(document["index"]), Trial(**document["trial"])


def stored_sharing(step_dir: StepDir) -> dict[str, float]:
    """Return the worker-seconds that a sweep has spent on what its trials share."""
    return Pieces(step_dir, SHARED).get(SECONDS, lambda spent: {k: float(v) for k, v in spent.items()}) or {}


def settle_stored(step_dir: StepDir) -> None:
    """Write down what is known of a sweep's trials, for the attempt that takes it over: what a driver before it still
    writes counts no more."""
    for folder in (TRIALS, SHARED):
        Pieces(step_dir, folder).settle()


@dataclass
class TrialQueue:
    """Gives Tune the next trial, hears of each, and registers what is done.

    `listed` are the trials known beforehand; with Optuna they are asked for one by one. `failures` says, by key, why
    a trial that is done could not be registered, or lost its workers: those are tried again by the same command.
    """

    base: Config
    sweep: Sweep
    key: str
    step_dir: StepDir
    listed: Sequence[PlannedTrial]
    outbox: Outbox
    advance: Advance
    trials: dict[str, Trial] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    capped: bool = False
    _running: dict[str, tuple[PlannedTrial, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sharing = stored_sharing(self.step_dir)
        self._halving = None if self.sweep.asha is None else Halving(self.sweep.asha)
        self._kept = Pieces(self.step_dir, TRIALS)
        self.workers = max(1, self.base.resources.workers)

    @property
    def total(self) -> int:
        """Return the number of trials; with Optuna, the most that there may be."""
        return len(self.listed) if self.sweep.search != "optuna" else self.sweep.at_most

    @property
    def ended_count(self) -> int:
        """Return how many trials have ended."""
        return sum(trial.status != "running" for trial in self.trials.values())

    @property
    def spent_s(self) -> float:
        """Return the worker-seconds of all trials so far, and of what they share."""
        begun = sum((time.monotonic() - start) * self.workers for _, start in self._running.values())
        return begun + sum(trial.worker_seconds for trial in self.trials.values()) + sum(self._sharing.values())

    def charge(self, name: str, worker_seconds: float) -> None:
        """Write down what shared steps took, which counts like a trial."""
        if worker_seconds:
            self._sharing[name] = self._sharing.get(name, 0.0) + worker_seconds
            Pieces(self.step_dir, SHARED).put(SECONDS, self._sharing)

    def settle(self) -> bool:
        """Take in what needs no worker: trials whose package is there. Returns whether others are left to run."""
        for planned in self.waiting:
            if planned.plan.step(Package).dir.record(Package) is not None:  # there now, if not when it was planned
                self._register(planned, self._started(planned))
        return self.left

    @property
    def waiting(self) -> list[PlannedTrial]:
        """Return the trials known beforehand that are to be run."""
        return [planned for planned in self.listed if self._waits(planned.key)]

    @property
    def left(self) -> bool:
        """Tell whether there are trials to run."""
        asked = self.sweep.search == "optuna"
        return bool(self.waiting) or (asked and (len(self.trials) < self.total or any(map(self._waits, self.trials))))

    def _waits(self, key: str) -> bool:
        known = self.trials.get(key)
        return (known is None or known.status == "running") and key not in self._running and key not in self.failures

    def over(self) -> bool:
        """Tell whether the cap of worker-hours is used up."""
        cap = self.base.resources.max_worker_hours
        return cap is not None and self.spent_s >= cap * 3600

    def next(self) -> tuple[str, Any] | None:
        """Start the next trial: its key and the plan for its worker; None: there are no more, or the cap is used up."""
        if self.over():
            self.capped = self.capped or self.left
            return None
        if (planned := self._chosen()) is None:
            return None
        self.keep(self._started(planned))
        self._running[planned.key] = (planned, time.monotonic())
        return planned.key, worker_plan(planned.plan)

    def _chosen(self) -> PlannedTrial | None:
        if waiting := self.waiting:
            return waiting[0]
        if self.sweep.search != "optuna":
            return None
        left = next((trial for key, trial in self.trials.items() if self._waits(key)), None)
        return plan_trial(self.base, left.values) if left is not None else self._sampled()

    def _sampled(self) -> PlannedTrial | None:
        for attempt in range(SAMPLES_A_TRIAL * self.total):
            if len(self.trials) >= self.total:
                return None
            tried = [(trial.values, self.scores(trial)) for trial in self.trials.values()]
            values = sample_values(self.sweep, len(self.trials) + attempt * self.total, tried)
            try:
                planned = plan_trial(self.base, values)
            except ConfigError as error:
                key = step_key("impossible", 1, {"values": canonical_json(values)}, {})
                if key not in self.trials:
                    bits = str(values.get("quant.bits", self.base.quant.bits))
                    self.keep(Trial(key=key, bits=bits, values=values, status="failed", failure=str(error)))
                continue
            if planned.key not in self.trials:
                return planned
        return None

    def scores(self, trial: Trial) -> tuple[float, ...] | None:
        """Return a trial's objectives on validation, each to be minimised; None: it has none yet."""
        if trial.status != "done" or trial.size is None:
            return None
        return scores(self.sweep.objectives, **trial.validation, packed_bytes=trial.size.packed_bytes)

    def reported(self, key: str, result: dict[str, Any]) -> None:
        """Send a running trial's curves to MLflow, and keep the last validation. Raises FencedOffError if the sweep was
        taken over, which ends it."""
        self.step_dir.notice_takeover()
        planned, _ = self._running[key]
        for stage, points in result.get(POINTS, ()):
            self.outbox.put(target_of(planned.plan, label(planned.values), self.key), runs.prefixed(stage, points))
        if math.isfinite(result[LOSS]):
            last = {STEP: float(result[STEP]), LOSS: float(result[LOSS])}
            self.trials[key] = self.trials[key].model_copy(update={"last": last})
            self._say(f"{label(planned.values)}: step {result[STEP]}, validation {result[LOSS]:.3f} nats")

    def goes_on(self, key: str, step: int, nats: float) -> bool:
        """Tell whether a running trial goes on after a validation, as `sweep.asha` says."""
        if self._halving is None:
            return True
        planned, _ = self._running[key]
        size = planned.packed_bytes if "bytes" in self.sweep.objectives else 0
        return self._halving.goes_on(key, planned.plan.step(Teacher).key, size, step, nats)

    def ended(self, key: str, status: str, failure: str) -> None:
        """Keep what became of a trial; register it if it is done. `status`: done, stopped, failed or lost."""
        if key not in self._running:  # it ended before, and what was said of it could not be kept
            return
        planned, start = self._running.pop(key)
        trial = self.trials[key]
        trial = trial.model_copy(update={"seconds": trial.seconds + time.monotonic() - start, "failure": failure})
        if status == "lost":  # by no fault of its own: the same command tries it again
            self.failures[key] = failure
            self.keep(trial)
        elif status == "done":
            self._register(planned, trial)
        else:
            self._fail(planned, trial.model_copy(update={"status": status}))
        self._say(f"{label(planned.values)}: {status}")

    def refuse(self, group: Sequence[PlannedTrial], failure: str) -> None:
        """Write down as failed the trials that cannot run, for what they share cannot be made."""
        for planned in group:
            self._fail(planned, self._started(planned).model_copy(update={"status": "failed", "failure": failure}))

    def _fail(self, planned: PlannedTrial, trial: Trial) -> None:
        """Write down a trial that was stopped or failed, here and in MLflow."""
        self.keep(trial)
        ending = "KILLED" if trial.status == "stopped" else "FAILED"
        self.outbox.put(target_of(planned.plan, label(planned.values), self.key), [], ending)

    def _register(self, planned: PlannedTrial, trial: Trial) -> None:
        """Read the results of a trial that is done but for its registration, and register the package from here."""
        config, failure = planned.plan.config, ""
        alone = config.resources.model_copy(update={"workers": 0})  # in this process, by the trial's own keys
        plan = replace(plan_run(config), config=config.model_copy(update={"resources": alone}))
        target = target_of(plan, label(planned.values), self.key)
        try:
            if (version := plan.last.record) is None:
                self.outbox.flush()
                runs.find_run(target)
            else:  # made by `compress`, or by another sweep, whose it remains
                runs.nest(target, runs.client_of(target.uri).get_run(version.run_id))
            run_plan(plan, MlflowListener(SilentListener(), self.outbox, target))
        except NotRegisteredError as error:
            failure = str(error)
        except (BitmillError, *runs.FAULTS) as error:
            self.failures[planned.key] = str(error)
            self.keep(trial)
            return
        self.keep(described(plan_run(config), trial.model_copy(update={"status": "done", "failure": failure})))

    def _started(self, planned: PlannedTrial) -> Trial:
        """Return what is known of a trial, or a new one."""
        keys, bits = {step.name: step.key for step in planned.plan.steps}, planned.plan.config.quant.bits
        return self.trials.get(planned.key) or Trial(
            key=planned.key, bits=bits, values=planned.values, status="running", workers=self.workers, step_keys=keys
        )

    def keep(self, trial: Trial) -> None:
        """Write a trial down."""
        self.trials[trial.key] = trial
        entry = {"index": list(self.trials).index(trial.key), "trial": trial.model_dump(mode="json")}
        self._kept.put(trial.key, entry)

    def _say(self, note: str) -> None:
        ended, running = self.ended_count, len(self._running)
        point = {"trials_running": float(running), "trials_waiting": float(max(0, self.total - ended - running))}
        self.advance(ended, self.total, note, [{"step": float(ended), **point}])


def described(plan: RunPlan, trial: Trial) -> Trial:
    """Return the trial with what the records of its steps say."""
    evaluation, package, version = (plan.step(kind).record for kind in (Evaluation, Package, ModelVersion))
    facts: dict[str, Any] = {name: getattr(evaluation, name) for name in ("teacher", "student", "validation")}
    facts["size"] = package.size
    if version is not None:
        facts["version"] = {"name": version.name, "version": version.version, "aliases": list(version.aliases)}
    return trial.model_copy(update=facts)


def worker_plan(plan: RunPlan) -> RunPlan:
    """Return what a trial's worker runs: all but the registration; a single worker trains in the trial's own process,
    where Ray Train would cost 20 seconds a trial.

    Several train by Ray Train, which must not start lost ones again by itself: when a trial is stopped and its
    placement group removed, it would make another that nobody knows of. Tune tries a trial that lost a worker again.
    """
    resources = plan.config.resources
    changed = resources.model_copy(update={"workers": 0} if resources.workers == 1 else {"max_failures": 0})
    steps = tuple(step for step in plan.steps if step.stage.record is not ModelVersion)
    return replace(plan, steps=steps, config=plan.config.model_copy(update={"resources": changed}))


def run_trial(plan: RunPlan, report: Callable[[dict[str, Any]], None]) -> None:
    """Run a trial up to its package, in its own process; each validation of the student is reported."""
    with contextlib.closing(Engine(plan.config.resources)) as engine:
        run_plan(plan, TrialListener(report, engine), engine=engine)


class TrialListener(SilentListener):
    """A listener that gathers curves and reports them with each validation of the student."""

    def __init__(self, report: Callable[[dict[str, Any]], None], engine: Engine) -> None:
        self._report, self._engine = report, engine
        self._gathered: list[tuple[str, list[Point]]] = []

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        """Gather points; report what is gathered at a validation of the student."""
        self._gathered.append((stage, list(points)))
        validated = [point for point in points if LOSS in point]
        if stage == Student.stage and validated:
            last = {STEP: int(validated[-1]["step"]), LOSS: validated[-1][LOSS]}
            self._report({**last, POINTS: self._gathered, GROUPS: sorted(self._engine.groups)})
            self._gathered = []
