"""What a sweep would cost, and on what the figures rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean

import torch

from pipeline.config.training import Distill, Finetune
from pipeline.execution.engine import set_threads
from pipeline.flow.plan import PlannedStep, RunPlan
from pipeline.flow.run import worker_seconds
from pipeline.models.device import device_for
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
    """The cost of what is left to run. `hours_basis` says whether trials were measured or only counted."""

    trials: int
    left: int
    shared_steps: int
    worker_hours: float
    hours_basis: str
    bytes: int
    bytes_basis: str


def estimate(planned: SweepPlan) -> Estimate:
    """Estimate what is left of a sweep: trials, shared steps, worker-hours and bytes."""
    set_threads(max(1, int(planned.config.resources.cpus_per_worker)))  # those of a worker, whose rate is measured
    trials = len(planned.record.trials if planned.record else planned.known) or planned.at_most
    ended = {key for key, trial in planned.trials.items() if trial.status != "running"}
    left = [trial for trial in planned.known if trial.key not in ended]
    count = len(left) if planned.known else max(0, trials - len(ended))
    seconds, basis = _seconds_a_row(planned)
    plans = [trial.plan for trial in left] or [planned.base]
    shared = {step.key: (step, plan) for plan in (plans if count else []) for step in plan.left if step.stage.shared}
    rows = count * mean(_rows_trained(plan.config.distill, plan) for plan in plans)
    rows += sum(_rows_of(step, plan) for step, plan in shared.values())
    caches = sum(plan.cache_bytes for step, plan in shared.values() if step.stage.record is TeacherCache)
    return Estimate(
        trials=trials,
        left=count,
        shared_steps=len(shared),
        worker_hours=seconds * rows / 3600,
        hours_basis=basis,
        bytes=int(count * mean(_kept_bytes(plan) for plan in plans) + caches),
        bytes_basis="4 bytes a parameter for each student and its bits for the package, and each cache that is missing",
    )


def _rows_of(step: PlannedStep, plan: RunPlan) -> float:
    """Return what a shared step takes, in rows of distillation that take as long; to tokenize takes next to nothing."""
    section = plan.config.finetune
    if step.stage.record is Teacher and section is not None:
        return _rows_trained(section, plan) * TRAINING / DISTILLING
    if step.stage.record is TeacherCache:
        return (plan.rows if plan.cache_bytes else 0) * FORWARD / DISTILLING
    return 0.0


def _seconds_a_row(planned: SweepPlan) -> tuple[float, str]:
    """Return the worker-seconds of a row of distillation, and where the figure comes from."""
    measured = [
        trial.worker_seconds / _rows_trained(known.plan.config.distill, known.plan)
        for known in planned.known
        if (trial := planned.trials.get(known.key)) is not None and trial.status == "done" and trial.seconds > 0
    ]
    if measured:
        return mean(measured), f"measured: {len(measured)} trials of this sweep"
    if timed := _timed_before(planned.base):
        return mean(timed), f"measured: {len(timed)} students of this teacher in the store"
    rate = REACHED * flops_per_s(device_for(planned.config.resources))
    seconds = DISTILLING * planned.base.parameters * planned.base.config.task.block_length / rate
    basis = f"{DISTILLING} x {planned.base.parameters:,} parameters a token at {rate / 1e9:.1f} GFLOP/s"
    return seconds, f"estimated: {basis}, {REACHED:g} of what this machine's matrix products reach"


def _timed_before(base: RunPlan) -> list[float]:
    """Return the worker-seconds of a row of training, of students of the same teacher that were trained in one go."""
    return [
        seconds / (record.steps * record.recipe["distill"]["batch_size"])
        for record in records(base.step(Student).dir.storage_uri, Student)
        if record.inputs.get(Teacher.stage) == base.step(Teacher).key
        and (seconds := worker_seconds(record))
        and record.steps
    ]


def _rows_trained(section: Finetune | Distill, plan: RunPlan) -> int:
    steps, batch = section.steps, section.batch_size
    return max(1, int((section.epochs or 0) * plan.rows / batch) if steps is None else steps) * batch


def _kept_bytes(plan: RunPlan) -> int:
    bits = BitWidths.parse(plan.config.quant.bits)
    return int(plan.parameters * (4 + max(bits.weights, bits.embedding) / 8))


def flops_per_s(device: torch.device) -> float:
    """Measure the rate of a large product of matrices on a device of this machine, operations a second."""
    size, repeats = 512, 8
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)
