"""What a sweep would cost, and on what the figures rest."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from pipeline.execution.engine import set_threads
from pipeline.flow import run as flow
from pipeline.flow.preflight import flops_per_s
from pipeline.quant.spec import BitWidths
from pipeline.store.records import Student, Teacher, TeacherCache
from pipeline.store.step_store import records
from pipeline.sweep.run import SweepPlan

# Operations for each parameter and token.
FORWARD, TRAINING = 2, 6
DISTILLING = TRAINING + FORWARD  # the student, and its teacher's head or the teacher
# Of the rate of a large product of matrices, what training small models reaches: 0.27 and 0.36 where we measured it.
REACHED = 0.3


@dataclass(frozen=True)
class Estimate:
    """Of what is left to run. `hours_basis` says whether trials were measured or only counted."""

    trials: int
    left: int
    shared_steps: int
    worker_hours: float
    hours_basis: str
    bytes: int
    bytes_basis: str


def estimate(planned: SweepPlan) -> Estimate:
    set_threads(max(1, int(planned.config.resources.cpus_per_worker)))  # those of a worker, whose rate is measured
    trials = len(planned.record.trials if planned.record else planned.known) or planned.at_most
    ended = sum(trial.status != "running" for trial in planned.trials.values())
    left = [one for one in planned.known if one.key not in _ended(planned)]
    count = len(left) if planned.known else max(0, trials - ended)
    seconds, basis = _seconds_a_row(planned)
    plans = [one.plan for one in left] or [planned.base]
    shared = {
        step.place.key: (step, plan)
        for plan in (plans if count else [])
        for step in plan.steps[: len(flow.SHARED)]
        if step.record is None
    }
    rows = count * mean(_steps(plan) * plan.config.distill.batch_size for plan in plans)
    rows += sum(_rows_of(step.stage, plan) for step, plan in shared.values())
    caches = sum(plan.cache_bytes for step, plan in shared.values() if step.stage == TeacherCache.stage)
    return Estimate(
        trials=trials,
        left=count,
        shared_steps=len(shared),
        worker_hours=seconds * rows / 3600,
        hours_basis=basis,
        bytes=int(count * mean(_kept_bytes(plan) for plan in plans) + caches),
        bytes_basis="4 bytes a parameter for each student and its bits for the package, and each cache that is missing",
    )


def _ended(planned: SweepPlan) -> set[str]:
    return {key for key, trial in planned.trials.items() if trial.status != "running"}


def _rows_of(stage: str, plan: flow.Plan) -> float:
    """What a shared step takes, in rows of distillation that take as long; to tokenize takes next to nothing."""
    section = plan.config.finetune
    if stage == Teacher.stage and section is not None:
        return (
            _steps_of(section.steps, section.epochs, section.batch_size, plan)
            * section.batch_size
            * TRAINING
            / DISTILLING
        )
    if stage == TeacherCache.stage:
        return (plan.rows if plan.cache_bytes else 0) * FORWARD / DISTILLING
    return 0.0


def _seconds_a_row(planned: SweepPlan) -> tuple[float, str]:
    """Worker-seconds of a row of distillation, and where the figure comes from."""
    measured = [
        trial.worker_seconds / (_steps(one.plan) * one.plan.config.distill.batch_size)
        for one in planned.known
        if (trial := planned.trials.get(one.key)) is not None and trial.status == "done" and trial.seconds > 0
    ]
    if measured:
        return mean(measured), f"measured: {len(measured)} trials of this sweep"
    timed = _timed_before(planned.base)
    if timed:
        return mean(timed), f"measured: {len(timed)} students of this teacher in the store"
    rate = REACHED * flops_per_s()
    width = planned.base.config.task.block_length
    seconds = DISTILLING * planned.base.parameters * width / rate
    basis = f"{DISTILLING} x {planned.base.parameters:,} parameters a token at {rate / 1e9:.1f} GFLOP/s"
    return seconds, f"estimated: {basis}, {REACHED:g} of what this machine's matrix products reach"


def _timed_before(base: flow.Plan) -> list[float]:
    """Worker-seconds of a row of training, of students of the same teacher that were trained in one go."""
    found = []
    for record in records(base.step(Student.stage).place.storage_uri, Student):
        same = record.inputs.get(Teacher.stage) == base.step(Teacher.stage).place.key
        seconds = float(record.provenance.get("seconds", 0)) * int(record.provenance.get("workers", 1))
        if same and seconds and record.steps:
            found.append(seconds / (record.steps * record.recipe["distill"]["batch_size"]))
    return found


def _steps(plan: flow.Plan) -> int:
    section = plan.config.distill
    return _steps_of(section.steps, section.epochs, section.batch_size, plan)


def _steps_of(steps: int | None, epochs: float | None, batch_size: int, plan: flow.Plan) -> int:
    return max(1, int((epochs or 0) * plan.rows / batch_size) if steps is None else steps)


def _kept_bytes(plan: flow.Plan) -> int:
    bits = BitWidths.parse(plan.config.quant.bits)
    return int(plan.parameters * (4 + max(bits.weights, bits.embedding) / 8))
