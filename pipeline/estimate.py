"""What a sweep would cost, and on what the figures rest."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from pipeline import flow
from pipeline.config import Config
from pipeline.preflight import flops_per_s
from pipeline.quant.spec import BitWidths
from pipeline.records import Student, Teacher
from pipeline.store import records
from pipeline.sweep import SweepPlan

FLOPS = 8  # a parameter and token of training: 6 for the student, 2 for its teacher's head or the teacher


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
    trials = len(planned.record.trials if planned.record else planned.known) or planned.at_most
    ended = sum(trial.status != "running" for trial in planned.trials.values())
    left = [one for one in planned.known if one.key not in _ended(planned)]
    count = len(left) if planned.known else max(0, trials - ended)
    seconds, basis = _seconds_a_step(planned)
    plans = [one.plan for one in left] or [planned.base]
    steps = count * mean(_steps(plan) * plan.config.distill.batch_size for plan in plans)
    shared = [step for step in planned.base.steps[:3] if step.record is None]
    kept = count * mean(_kept_bytes(plan) for plan in plans) + (planned.base.cache_bytes if shared else 0)
    return Estimate(
        trials=trials,
        left=count,
        shared_steps=len(shared),
        worker_hours=seconds * steps / 3600,
        hours_basis=basis + ("; the shared steps come on top" if shared else ""),
        bytes=int(kept),
        bytes_basis="4 bytes a parameter for each student and its bits for the package, and the cache if it is missing",
    )


def _ended(planned: SweepPlan) -> set[str]:
    return {key for key, trial in planned.trials.items() if trial.status != "running"}


def _seconds_a_step(planned: SweepPlan) -> tuple[float, str]:
    """Worker-seconds of a row of training, and where the figure comes from."""
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
    rate = flops_per_s()
    width = planned.base.config.task.block_length
    seconds = FLOPS * planned.base.parameters * width / rate
    return seconds, f"estimated: {FLOPS} x {planned.base.parameters:,} parameters a token at {rate / 1e9:.1f} GFLOP/s"


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
    recipe: Config = plan.config
    if recipe.distill.steps is not None:
        return max(1, recipe.distill.steps)
    return max(1, int((recipe.distill.epochs or 0) * plan.rows / recipe.distill.batch_size))


def _kept_bytes(plan: flow.Plan) -> int:
    bits = BitWidths.parse(plan.config.quant.bits)
    return int(plan.parameters * (4 + max(bits.weights, bits.embedding) / 8))
