"""A sweep: many runs of the flow that share what they can. What is tried and found is kept in its own step directory.

A trial is an ordinary configuration with other values, so its steps have the keys that `compress` gives them. The
driver makes the shared steps once, Tune runs the rest of each trial up to its package, and the driver registers it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.config.laid_over import label, laid_over
from pipeline.config.run import Config
from pipeline.config.sweep import Sweep
from pipeline.errors import BitmillError, ConfigError, RunError
from pipeline.execution import ray_tune
from pipeline.execution.engine import Engine
from pipeline.execution.gauges import published
from pipeline.execution.ray_tune import PASSING
from pipeline.flow.plan import Once, RunPlan, find_start, plan_run, target_of
from pipeline.flow.run import run_plan
from pipeline.provenance import provenance
from pipeline.store import step_store
from pipeline.store.keys import recipe_of, step_key
from pipeline.store.locations import anchored, scratch_dir, storage_uri
from pipeline.store.records import SweepRecord, TeacherCache, Trial
from pipeline.store.step_store import StepDir
from pipeline.sweep import bit_budget
from pipeline.sweep.pareto import pareto_front
from pipeline.sweep.queue import (
    PlannedTrial,
    TrialQueue,
    plan_trial,
    run_trial,
    settle_stored,
    stored_sharing,
    stored_trials,
)
from pipeline.sweep.trials import check_sweep, drawn, listed, naming_versions
from pipeline.tracking import registry, runs
from pipeline.tracking.listener import Listener, tell
from pipeline.tracking.mlflow_listener import MlflowListener, load_watched
from pipeline.tracking.outbox import Outbox, outbox_folder, send_waiting
from pipeline.tracking.runs import Target

VERSION = 2
NOT_IN_KEY = ("max_concurrent",)
TRIALS = "trials"
PAGE = "report.html"
EXAMPLES = 20  # draws among which one must work


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: its record if it is finished and all is registered; else the trials that can be named beforehand."""

    config: Config
    sweep: Sweep
    base: RunPlan
    step_dir: StepDir
    recipe: dict[str, Any]
    known: tuple[PlannedTrial, ...]
    trials: dict[str, Trial]
    record: SweepRecord | None
    retry_failed: bool

    @property
    def key(self) -> str:
        """Return the sweep's key."""
        return self.step_dir.key

    @property
    def at_most(self) -> int:
        """Return the most trials that there may be, where they cannot be named beforehand."""
        if self.sweep.budget_mib is not None:
            return len(_combinations(self.sweep)) * self.sweep.proposals
        return self.sweep.at_most


def plan_sweep(config: Config, retry_failed: bool = False) -> SweepPlan:
    """Check the whole space and plan every trial that can be named; starts nothing.

    `retry_failed`: trials that failed are to run again.

    Raises:
        ConfigError: what cannot work, by path or by trial.
    """
    sweep = check_sweep(config)
    config = config.model_copy(update={"resources": anchored(config.resources)})
    once = Once()
    base = plan_run(config, once=once)
    sweep = naming_versions(sweep, lambda model: find_start(config, model, once).version)
    config = base.config.model_copy(update={"sweep": sweep})
    recipe = {"sweep": {k: v for k, v in recipe_of(sweep).items() if k not in NOT_IN_KEY}}
    key = step_key(SweepRecord.stage, VERSION, recipe, {"register": base.run_key})
    resources = config.resources
    step_dir = StepDir(
        storage_uri(resources),
        SweepRecord.stage,
        key,
        scratch_dir(resources),
        local_cache_gib=resources.local_cache_gib,
    )
    trials = stored_trials(step_dir)
    if retry_failed:
        trials = {key: _again(trial) if _failed(trial) else trial for key, trial in trials.items()}
    ended = all(trial.status != "running" for trial in trials.values())  # else an old record does not count
    record = step_dir.record(SweepRecord) if ended else None
    planned = SweepPlan(config, sweep, base, step_dir, recipe, (), trials, record, retry_failed)
    if planned.record is not None and all(_registered(planned, planned.record.trials)):
        return planned
    return replace(planned, known=_known(config, sweep, once), record=None)


def _known(config: Config, sweep: Sweep, once: Once) -> tuple[PlannedTrial, ...]:
    """Return the trials that can be named before anything runs; two that come to the same are one."""
    if sweep.budget_mib is not None:  # what fits is known once sensitivities are measured
        for combined in map(partial(laid_over, config), _combinations(sweep)):
            bit_budget.check_budget(combined, bit_budget.layout_of(combined), sweep.budget_mib)
        return ()
    if sweep.search == "optuna":  # a few examples, so that a space that cannot work at all is found out
        _one_that_works(config, sweep, once)
        return ()
    trials = [plan_trial(config, values, once) for values in listed(sweep)]
    return tuple({trial.key: trial for trial in trials}.values())


def _one_that_works(config: Config, sweep: Sweep, once: Once) -> PlannedTrial:
    """Return the first of a few draws that can run. Raises ConfigError: none can, and why the first cannot."""
    first = None
    for index in range(EXAMPLES):
        try:
            return plan_trial(config, drawn(sweep, index), once)
        except ConfigError as error:
            first = first or error
    raise first or ConfigError("sweep: nothing was drawn")


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep. `complete` is False if the cap of worker-hours left trials for another time."""

    trials: tuple[Trial, ...]
    front: tuple[str, ...]
    complete: bool
    spent_hours: float  # of workers: trials, and what they share as far as this sweep made it
    unfinished: tuple[tuple[str, str], ...] = ()  # labels of trials, and why
    untold: str = ""  # what MLflow has not taken


def run_sweep(planned: SweepPlan, listener: Listener, wait: bool = True) -> SweepResult:
    """Run the trials that have not ended, at most as many as `max_worker_hours` allows, and register what is done.

    Raises:
        BitmillError: what went wrong; trials that ended are kept.
    """
    if (record := planned.record) is not None:
        shared = sum(stored_sharing(planned.step_dir).values())
        hours = (sum(trial.worker_seconds for trial in record.trials) + shared) / 3600
        return SweepResult(record.trials, record.front, True, hours, untold=send_waiting(planned.config.resources))
    step_store.check_store(storage_uri(planned.config.resources))
    parent = parent_of(planned)
    runs.connect(parent.uri)
    outbox = Outbox(outbox_folder(planned.config.resources))
    engine = Engine(planned.config.resources)
    for name in ("sweep", TRIALS):
        listener.named(name, planned.key)
    try:
        with planned.step_dir.hold(wait, lambda owner: listener.waiting("sweep", owner)) as step_dir, outbox:
            curves = MlflowListener(listener, outbox, parent)
            with load_watched(outbox, parent):
                begun = time.monotonic()
                queue = _queue(_with_proposals(planned, curves, wait), step_dir, outbox, listener)
                if planned.sweep.budget_mib is not None:
                    queue.charge("proposals", (time.monotonic() - begun) * queue.workers)
                if queue.settle() and not queue.over():
                    _run(planned, queue, engine, step_dir, curves, wait)
                queue.capped = queue.capped or (queue.over() and bool(queue.left))
            result = _conclude(planned, queue, step_dir)
    except BitmillError as error:
        raise type(error)(" ".join(filter(None, [str(error), outbox.told()]))) from error
    finally:
        engine.close()
    return replace(result, untold=outbox.told())


def _queue(planned: SweepPlan, step_dir: StepDir, outbox: Outbox, listener: Listener) -> TrialQueue:
    """Queue the trials known, under the lease; one whose version the registry lost is to be registered again."""
    settle_stored(step_dir)
    trials = stored_trials(step_dir)
    held = _registered(planned, tuple(trials.values()))
    advance = partial(tell, listener, TRIALS)
    queue = TrialQueue(planned.config, planned.sweep, planned.key, step_dir, planned.known, outbox, advance, trials)
    for trial, there in zip([*trials.values()], held, strict=True):
        if not there or (planned.retry_failed and _failed(trial)):
            for page in step_dir.sizes(PAGE):  # first: else a killed driver leaves a page of what is no more
                step_dir.delete(page)
            queue.keep(_again(trial))
    return queue


def _failed(trial: Trial) -> bool:
    """Tell whether a trial failed and may run again: values that no configuration takes have no steps."""
    return trial.status == "failed" and bool(trial.step_keys)


def _again(trial: Trial) -> Trial:
    return trial.model_copy(update={"status": "running", "failure": ""})


def _with_proposals(planned: SweepPlan, listener: Listener, wait: bool) -> SweepPlan:
    """Return the plan, its trials the assignments of bits that fit `budget_mib`, for each combination of the space."""
    sweep = planned.sweep
    if sweep.budget_mib is None:
        return planned
    known, once = {}, Once()
    for values in _combinations(sweep):
        config = laid_over(planned.config, values)
        for bits in bit_budget.proposals(config, sweep.budget_mib, sweep.proposals, listener, wait):
            trial = plan_trial(planned.config, {**values, **bits}, once)
            known[trial.key] = trial
    return replace(planned, known=tuple(known.values()))


def _combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the combinations of the space beside a budget, which needs none."""
    return listed(sweep) or [{}]


def _run(
    planned: SweepPlan, queue: TrialQueue, engine: Engine, step_dir: StepDir, listener: MlflowListener, wait: bool
) -> None:
    """Run the steps that trials share, once each; then the trials. Where some trials share what cannot be made, the
    others go on."""
    sharing: dict[str, list[PlannedTrial]] = {}
    for trial in queue.waiting:
        sharing.setdefault(trial.plan.step(TeacherCache).key, []).append(trial)
    for group in sharing.values() or [[]]:
        if queue.over():
            return
        config = group[0].plan.config if group else planned.config
        begun = time.monotonic()
        try:
            made = run_plan(plan_run(config, TeacherCache.stage), listener, wait, engine)
        except RunError as error:
            queue.charge("failed", (time.monotonic() - begun) * queue.workers)
            if len(group) in (0, queue.total) or isinstance(error, PASSING):
                raise
            queue.refuse(group, str(error))
        else:
            queue.charge(made.finished(TeacherCache).dir.key, made.worker_seconds)
    listener.started(TRIALS)
    if queue.left:
        with published(planned.config.name, TRIALS, planned.key, queue.advance) as queue.advance:
            engine.told = partial(queue.advance, 0, queue.total)
            ray_tune.run_trials(run_trial, queue, engine, step_dir, planned.sweep.max_concurrent)


def _conclude(planned: SweepPlan, queue: TrialQueue, step_dir: StepDir) -> SweepResult:
    """Register what could not be registered before, find the front, and commit the record if nothing is left."""
    lost, queue.failures = queue.failures, {}
    queue.settle()
    reasons = lost | queue.failures
    left = [trial for trial in queue.trials.values() if trial.status == "running"]
    if left and not queue.capped:
        why = reasons.get(left[0].key, "it was interrupted.")
        raise RunError(
            f"{len(left)} of {queue.total} trials are not finished, first {label(left[0].values)}: {why} "
            f"What is done is kept at {step_dir.uri}; the same command goes on from there."
        )
    trials = tuple(queue.trials.values())
    scored = {trial.key: point for trial in trials if (point := queue.scores(trial)) is not None}
    best = tuple(list(scored)[index] for index in pareto_front(list(scored.values())))
    _log_parent(planned, queue, trials, best)
    if not queue.capped:
        record = SweepRecord(
            key=step_dir.key,
            stage_version=VERSION,
            recipe=planned.recipe,
            inputs={"register": planned.base.run_key},
            provenance=provenance(),
            name=planned.config.name,
            objectives=planned.sweep.objectives,
            trials=trials,
            front=best,
        )
        step_dir.commit(record, instead_of=step_dir.record(SweepRecord))
    unfinished = tuple((label(queue.trials[key].values), why) for key, why in reasons.items())
    return SweepResult(trials, best, not queue.capped, queue.spent_s / 3600, unfinished)


def _log_parent(planned: SweepPlan, queue: TrialQueue, trials: tuple[Trial, ...], best: tuple[str, ...]) -> None:
    parent, sweep = parent_of(planned), planned.sweep
    recipe = planned.config.model_dump(mode="json", by_alias=True, exclude={"resources"})
    documents = {"trials.json": [trial.model_dump(mode="json") for trial in trials], "recipe.json": recipe}
    queue.outbox.flush()
    try:
        runs.log_sweep(
            parent,
            {"search": sweep.search, "objectives": ", ".join(sweep.objectives), "paths": ", ".join(sweep.space)},
            {"trials": len(trials), "front": len(best), "worker_hours": queue.spent_s / 3600},
            {name: json.dumps(document, indent=1) for name, document in documents.items()},
        )
    except runs.FAULTS as error:
        raise RunError(
            f"What is done is kept, and MLflow at {parent.uri} refused the sweep's own run: "
            f"{str(error).splitlines()[0]}. The same command sends it."
        ) from error


def parent_of(planned: SweepPlan) -> Target:
    """Return the MLflow run of the sweep, in which its trials are nested."""
    return replace(target_of(planned.base, "sweep", None), key=planned.key)


def _registered(planned: SweepPlan, trials: Sequence[Trial]) -> list[bool]:
    """Tell of each trial whether it needs no registration; False if it was registered and the registry does not hold it
    now. One search a name."""
    names = {trial.version["name"] for trial in trials if trial.version is not None}
    held = {name: registry.held_keys(parent_of(planned).uri, name) for name in names}
    return [trial.version is None or trial.key in held[trial.version["name"]] for trial in trials]
