"""A sweep: many runs of the flow that share what they can. What is tried and found is kept in a place of its own.

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

from pipeline.config.run import Config
from pipeline.config.sweep import Sweep
from pipeline.errors import BitmillError, ConfigError, RunError
from pipeline.execution import ray_tune
from pipeline.execution.engine import Engine
from pipeline.execution.ray_tune import PASSING
from pipeline.flow import run as flow
from pipeline.stages.stage import provenance
from pipeline.store import step_store
from pipeline.store.keys import recipe_of, step_key
from pipeline.store.locations import anchored, scratch_dir, storage_uri
from pipeline.store.records import SweepRecord, TeacherCache, Trial
from pipeline.store.step_store import StepDir
from pipeline.sweep import bit_budget
from pipeline.sweep.pareto import front
from pipeline.sweep.queue import Candidate, Feed, candidate, run_trial, stored_sharing, stored_trials
from pipeline.sweep.trials import check_sweep, drawn, label, listed, scores, trial_config
from pipeline.tracking import registry, runs
from pipeline.tracking.listener import Observer
from pipeline.tracking.outbox import LiveRun, Outbox, load_watched, outbox_folder, send_waiting
from pipeline.tracking.runs import Target

VERSION = 1
NOT_IN_KEY = ("max_concurrent",)
TRIALS = "trials"
PAGE = "report.html"  # beside the record
EXAMPLES = 20  # draws among which one must work


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: its record if it is finished and all is registered; else the trials that can be named beforehand."""

    config: Config
    sweep: Sweep
    base: flow.Plan
    place: StepDir
    recipe: dict[str, Any]
    known: tuple[Candidate, ...]
    trials: dict[str, Trial]
    record: SweepRecord | None
    retry_failed: bool

    @property
    def key(self) -> str:
        return self.place.key

    @property
    def at_most(self) -> int:
        """Trials where they cannot be named beforehand."""
        if self.sweep.budget_mib is not None:
            return len(_combinations(self.sweep)) * self.sweep.proposals
        return self.sweep.at_most


def plan(config: Config, retry_failed: bool = False) -> SweepPlan:
    """Check the whole space and plan every trial that can be named; starts nothing.

    `retry_failed`: trials that failed are to run again.

    Raises:
        ConfigError: what cannot work, by path or by trial.
    """
    sweep = check_sweep(config)
    config = config.model_copy(update={"resources": anchored(config.resources)})
    base = flow.plan(config)
    recipe = {"sweep": {k: v for k, v in recipe_of(sweep).items() if k not in NOT_IN_KEY}}
    key = step_key(SweepRecord.stage, VERSION, recipe, {"register": base.run_key})
    place = StepDir(storage_uri(config.resources), SweepRecord.stage, key, scratch_dir(config.resources))
    trials, record = stored_trials(place), place.record(SweepRecord)
    if retry_failed and any(_failed(trial) for trial in trials.values()):
        trials, record = {key: _again(trial) if _failed(trial) else trial for key, trial in trials.items()}, None
    planned = SweepPlan(config, sweep, base, place, recipe, (), trials, record, retry_failed)
    if planned.record is not None and all(_registered(planned, planned.record.trials)):
        return planned
    return replace(planned, known=_known(config, sweep), record=None)


def _known(config: Config, sweep: Sweep) -> tuple[Candidate, ...]:
    """The trials that can be named before anything runs; two that come to the same are one."""
    if sweep.budget_mib is not None:  # what fits is known once sensitivities are measured
        for combined in map(partial(trial_config, config), _combinations(sweep)):
            bit_budget.check_budget(combined, bit_budget.layout_of(combined), sweep.budget_mib)
        return ()
    if sweep.search == "optuna":  # a few examples, so that a space that cannot work at all is found out
        _one_that_works(config, sweep)
        return ()
    found = [candidate(config, values) for values in listed(sweep)]
    return tuple({one.key: one for one in found}.values())


def _one_that_works(config: Config, sweep: Sweep) -> Candidate:
    """The first of a few draws that can run. Raises ConfigError: none can, and why the first cannot."""
    first = None
    for index in range(EXAMPLES):
        try:
            return candidate(config, drawn(sweep, index))
        except ConfigError as error:
            first = first or error
    raise first or ConfigError("sweep: nothing was drawn")


@dataclass(frozen=True)
class Found:
    """What a sweep gave. `complete` is False if the cap of worker-hours left trials for another time."""

    trials: tuple[Trial, ...]
    front: tuple[str, ...]
    complete: bool
    spent_hours: float  # of workers: trials, and what they share as far as this sweep made it
    unfinished: tuple[tuple[str, str], ...] = ()  # labels of trials, and why
    untold: str = ""  # what MLflow has not taken


def run(planned: SweepPlan, observer: Observer, wait: bool = True) -> Found:
    """Run the trials that have not ended, at most as many as `max_worker_hours` allows, and register what is done.

    Raises:
        BitmillError: what went wrong; trials that ended are kept.
    """
    record = planned.record
    if record is not None:
        spent = _hours(record.trials, stored_sharing(planned.place))
        return Found(record.trials, record.front, True, spent, untold=send_waiting(planned.config.resources))
    step_store.check_writable(storage_uri(planned.config.resources))
    parent = parent_of(planned)
    runs.connect(parent.uri)
    outbox = Outbox(outbox_folder(planned.config.resources))
    engine = Engine(planned.config.resources)
    workers = max(1, planned.config.resources.workers)
    try:
        with planned.place.hold(wait, lambda owner: observer.waiting("sweep", owner)) as place, outbox:
            live = LiveRun(observer, outbox, parent)
            with load_watched(outbox, parent):
                begun = time.monotonic()
                feed = _feed(_with_proposals(planned, live, wait), place, outbox, observer)
                feed.charge(
                    "proposals", (time.monotonic() - begun) * workers if planned.sweep.budget_mib is not None else 0.0
                )
                if feed.settle() and not feed.over():
                    _run(planned, feed, engine, place, live, wait)
                feed.capped = feed.capped or (feed.over() and bool(feed.left))
            found = _conclude(planned, feed, place)
    except BitmillError as error:
        raise type(error)(" ".join(filter(None, [str(error), outbox.told()]))) from error
    finally:
        engine.close()
    return replace(found, untold=outbox.told())


def _feed(planned: SweepPlan, place: StepDir, outbox: Outbox, observer: Observer) -> Feed:
    """What is known of the trials, under the lease; one whose version the registry lost is to be registered again."""

    def advance(done: int, total: int, note: str) -> None:
        observer.advanced(TRIALS, done, total, note)

    trials = stored_trials(place)
    held = _registered(planned, tuple(trials.values()))
    known = {
        key: trial if there and not (planned.retry_failed and _failed(trial)) else _again(trial)
        for (key, trial), there in zip(trials.items(), held, strict=True)
    }
    if planned.retry_failed or not all(held):  # a finished sweep some of whose trials are to run again
        place.forget_record()
        place.delete(PAGE)
    return Feed(planned.config, planned.sweep, planned.key, place, planned.known, outbox, advance, known)


def _failed(trial: Trial) -> bool:
    """Whether it may run again: values that no configuration takes have no steps."""
    return trial.status == "failed" and bool(trial.places)


def _again(trial: Trial) -> Trial:
    return trial.model_copy(update={"status": "running", "failure": ""})


def _with_proposals(planned: SweepPlan, observer: Observer, wait: bool) -> SweepPlan:
    """With the assignments of bits that fit `budget_mib` as trials, for each combination of the space."""
    sweep = planned.sweep
    if sweep.budget_mib is None:
        return planned
    known = {}
    for values in _combinations(sweep):
        config = trial_config(planned.config, values)
        for bits in bit_budget.proposals(config, sweep.budget_mib, sweep.proposals, observer, wait):
            one = candidate(planned.config, {**values, **bits})
            known[one.key] = one
    return replace(planned, known=tuple(known.values()))


def _combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """Of the space beside a budget, which needs none."""
    return listed(sweep) or [{}]


def _run(planned: SweepPlan, feed: Feed, engine: Engine, place: StepDir, live: LiveRun, wait: bool) -> None:
    """The steps that trials share, once each; then the trials. Where some trials share what cannot be made, the others
    go on."""
    workers = max(1, planned.config.resources.workers)
    sharing: dict[str, list[Candidate]] = {}
    for one in feed.waiting:
        sharing.setdefault(one.plan.step(TeacherCache.stage).place.key, []).append(one)
    for some in sharing.values() or [[]]:
        if feed.over():
            return
        config = some[0].plan.config if some else planned.config
        begun = time.monotonic()
        try:
            made = flow.run(flow.plan(config, TeacherCache.stage), live, wait, engine)
        except RunError as error:
            feed.charge("failed", (time.monotonic() - begun) * workers)
            if len(some) in (0, feed.total) or isinstance(error, PASSING):
                raise
            feed.refuse(some, str(error))
        else:
            feed.charge(made.done[TeacherCache.stage].place.key, made.worker_seconds)
    live.started(TRIALS)
    if feed.left:
        ray_tune.run_trials(run_trial, feed, engine, place, planned.sweep.asha, planned.sweep.max_concurrent)


def _conclude(planned: SweepPlan, feed: Feed, place: StepDir) -> Found:
    """Register what could not be registered before, find the front, and commit the record if nothing is left."""
    lost = feed.failures
    feed.failures = {}
    feed.settle()
    reasons = {**lost, **feed.failures}
    left = [trial for trial in feed.trials.values() if trial.status == "running"]
    if left and not feed.capped:
        why = reasons.get(left[0].key, "it was interrupted.")
        raise RunError(
            f"{len(left)} of {feed.total} trials are not finished, first {label(left[0].values)}: {why} "
            f"What is done is kept at {place.uri}; the same command goes on from there."
        )
    trials = tuple(feed.trials.values())
    best = _front(planned.sweep, trials)
    _log_parent(planned, feed, trials, best)
    if not feed.capped:
        record = SweepRecord(
            key=place.key,
            stage_version=VERSION,
            recipe=planned.recipe,
            inputs={"register": planned.base.run_key},
            provenance=provenance(),
            name=planned.config.name,
            objectives=planned.sweep.objectives,
            trials=trials,
            front=best,
        )
        place.commit(record)
    unfinished = tuple((label(feed.trials[key].values), why) for key, why in reasons.items())
    return Found(trials, best, not feed.capped, feed.spent_s / 3600, unfinished)


def _log_parent(planned: SweepPlan, feed: Feed, trials: tuple[Trial, ...], best: tuple[str, ...]) -> None:
    parent, sweep = parent_of(planned), planned.sweep
    documents = {
        "trials.json": [trial.model_dump(mode="json") for trial in trials],
        "recipe.json": planned.config.model_dump(mode="json", by_alias=True, exclude={"resources"}),
    }
    feed.outbox.flush()
    try:
        runs.log_sweep(
            parent,
            {"search": sweep.search, "objectives": ", ".join(sweep.objectives), "paths": ", ".join(sweep.space)},
            {"trials": len(trials), "front": len(best), "worker_hours": feed.spent_s / 3600},
            {name: json.dumps(document, indent=1) for name, document in documents.items()},
        )
    except runs.FAULTS as error:
        raise RunError(
            f"What is done is kept, and MLflow at {parent.uri} refused the sweep's own run: "
            f"{str(error).splitlines()[0]}. The same command sends it."
        ) from error


def parent_of(planned: SweepPlan) -> Target:
    """The MLflow run of the sweep, in which its trials are nested."""
    return replace(flow.target_of(planned.base, "sweep", None), key=planned.key)


def _front(sweep: Sweep, trials: tuple[Trial, ...]) -> tuple[str, ...]:
    """Keys of the trials that no other beats; stopped and failed ones are never among them."""
    done = [trial for trial in trials if trial.status == "done" and trial.size is not None]
    points = [scores(sweep.objectives, t.teacher, t.student, t.size.packed_bytes if t.size else 0) for t in done]
    return tuple(done[index].key for index in front(points))


def _registered(planned: SweepPlan, trials: Sequence[Trial]) -> list[bool]:
    """False for a trial that was registered and that the registry does not hold now; one search a name."""
    names = {trial.version["name"] for trial in trials if trial.version is not None}
    held = {name: registry.held_keys(parent_of(planned).uri, name) for name in names}
    return [trial.version is None or trial.key in held[trial.version["name"]] for trial in trials]


def _hours(trials: Sequence[Trial], sharing: dict[str, float]) -> float:
    return (sum(trial.worker_seconds for trial in trials) + sum(sharing.values())) / 3600
