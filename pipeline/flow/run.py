"""Runs a plan: where a step's record is there it is loaded, else the step runs and commits one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import DamagedError
from pipeline.execution.engine import Engine
from pipeline.execution.gauges import published
from pipeline.flow.plan import PlannedStep, RunPlan
from pipeline.stages.stage import Step
from pipeline.store.locations import storage_uri, tracking_uri
from pipeline.store.records import ModelVersion, Record
from pipeline.store.step_store import FinishedStep, StepDir, check_store
from pipeline.tracking import runs
from pipeline.tracking.listener import Listener, tell

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Outcome:
    """What became of each step, by stage."""

    steps: dict[str, FinishedStep[Any]] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def finished(self, kind: type[R]) -> FinishedStep[R]:
        """Return the step that made a kind of record."""
        return self.steps[kind.stage]

    @property
    def worker_seconds(self) -> float:
        """Return what the steps that ran took, without waiting for other commands."""
        ran = (self.steps[stage].record for stage, status in self.status.items() if status == "done")
        return sum(map(worker_seconds, ran))


def worker_seconds(record: Record) -> float:
    """Return what a step took on all workers, or 0 if it was not run in one go."""
    return float(record.provenance.get("seconds", 0)) * int(record.provenance.get("workers", 1))


def run_plan(plan: RunPlan, listener: Listener, wait: bool = True, engine: Engine | None = None) -> Outcome:
    """Run the steps that have no record; start Ray at most once, and only if something runs.

    `engine` may be given, and is left open; otherwise one is made of `config.resources`.

    Raises:
        BitmillError: what went wrong; what was committed is kept.
    """
    if not plan.left:
        return _Runner(plan, listener, wait, None).run()
    check_store(storage_uri(plan.config.resources))
    if plan.ends_with(ModelVersion):
        runs.connect(tracking_uri(plan.config.resources))
    used = engine or Engine(plan.config.resources)
    try:
        return _Runner(plan, listener, wait, used).run()
    finally:
        if engine is None:
            used.close()


class _Runner:
    """One pass over a plan; without an engine nothing is left to run."""

    def __init__(self, plan: RunPlan, listener: Listener, wait: bool, engine: Engine | None) -> None:
        self.plan, self.listener, self.wait, self.engine = plan, listener, wait, engine
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Load or run every step in order."""
        for step in self.plan.steps:
            start = time.perf_counter()
            self.listener.named(step.name, step.key)
            record, status = step.record, "reused"
            if record is None:
                self.listener.started(step.name)
                record, status = self._run_or_repair(step)
            seconds = time.perf_counter() - start if status == "done" else 0.0
            self.outcome.steps[step.name] = FinishedStep(record, step.dir)
            self.outcome.status[step.name], self.outcome.seconds[step.name] = status, seconds
            self.listener.finished(step.name, status, seconds)
        return self.outcome

    def _needed(self) -> list[StepDir]:
        """Return the steps of the plan, and those of other runs that it reads."""
        start, words = self.plan.pinned.start, self.plan.pinned.tokenizer
        others = [start.student, start.package] if start is not None else []
        others += [words.step.dir] if words is not None and words.step is not None else []
        return [planned.dir for planned in self.plan.steps] + others

    def _run_or_repair(self, step: PlannedStep) -> tuple[Record, str]:
        """Run a step; if it meets a damaged shard, make the shard again and run it once more."""
        try:
            return self._run_step(step)
        except DamagedError:
            damaged = [earlier for earlier in self.plan.steps if earlier.stage.repairs and earlier.name in step.inputs]
            if not damaged:
                raise
            for earlier in damaged:
                mended, _ = self._run_step(earlier, repair=True)
                self.outcome.steps[earlier.name] = FinishedStep(mended, earlier.dir)
            return self._run_step(step)

    def _run_step(self, step: PlannedStep, repair: bool = False) -> tuple[Record, str]:
        if self.engine is None:
            raise ValueError(f"the step {step.name} is to run, and there is no engine")
        kind = step.stage.record  # a version is done only when the registry holds it, whatever an old record says
        may_be_done = not repair and kind is not ModelVersion
        if may_be_done and (record := step.dir.record(kind)) is not None:  # since the plan was made: no lease is needed
            return record, "reused"
        with step.dir.hold(self.wait, lambda owner: self.listener.waiting(step.name, owner)) as held:
            before: Record | None = held.record(kind)
            if before is not None and may_be_done:
                return before, "reused"  # another process finished it while we waited
            held.announce(self._needed())
            begun = time.perf_counter()
            told = partial(tell, self.listener, step.name)
            with published(self.plan.config.name, step.name, step.key, told) as advance:
                self.engine.told = partial(advance, 0, 0)
                record = step.stage.run(
                    Step(
                        recipe=step.recipe,
                        inputs={stage: self.outcome.steps[stage] for stage in step.inputs},
                        dir=held,
                        resources=self.engine.resources,
                        locations=step.locations,
                        version=step.stage.version,
                        engine=self.engine,
                        advance=advance,
                    )
                )
            if repair and before is not None:
                record = record.model_copy(update={"provenance": before.provenance})
            elif held.fence == 1:  # in one go, so that the time says what the step costs
                workers = max(1, self.engine.resources.workers)
                took = {"seconds": f"{time.perf_counter() - begun:.3f}", "workers": str(workers)}
                record = record.model_copy(update={"provenance": {**record.provenance, **took}})
            return held.commit(record, instead_of=before), "done"
