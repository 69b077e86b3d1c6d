"""What a sweep would cost, and on what the figures rest."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from pipeline.flow.capacity import (
    HOUR_S,
    Caching,
    compared,
    corrected,
    money,
    rates_of,
    step_cost,
    timed_before,
    trained_rows,
)
from pipeline.flow.plan import RunPlan
from pipeline.flow.requests import NONE, Requests
from pipeline.quant.spec import BitWidths
from pipeline.store.records import TeacherCache
from pipeline.sweep.run import SweepPlan


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
    requests: Requests  # to S3; none with a directory
    cost: float | None  # in the currency of `resources.prices`; None without a price of an hour
    caching: Caching | None  # None: no trial is left, or states cannot be cached


def estimate(planned: SweepPlan) -> Estimate:
    """Estimate what is left of a sweep: trials, shared steps, worker-hours, bytes, requests and money."""
    rates = rates_of(planned.config.resources)
    trials = len(planned.record.trials if planned.record else planned.known) or planned.at_most
    ended = {key for key, trial in planned.trials.items() if trial.status != "running"}
    left = [trial for trial in planned.known if trial.key not in ended]
    count = len(left) if planned.known else max(0, trials - len(ended))
    factor, basis = 1.0, rates.basis
    timed, whose = _timed(planned)
    if timed and planned.base.config.distill.steps != 0:
        factor, basis = corrected(planned.base, rates, mean(timed)), f"measured: {len(timed)} {whose}"
    plans = [trial.plan for trial in left] or [planned.base]
    shared = {step.key: (step, plan) for plan in (plans if count else []) for step in plan.left if step.stage.shared}
    makes = [step_cost(step, plan, rates) for step, plan in shared.values()]
    own = [[step_cost(step, plan, rates) for step in plan.left if not step.stage.shared] for plan in plans]
    seconds = sum(cost.worker_seconds for cost in makes)
    seconds += count * mean(sum(cost.worker_seconds for cost in costs) for costs in own)
    asked = sum((cost.requests for cost in makes), NONE)
    asked += sum((cost.requests for costs in own for cost in costs), NONE) * (count / len(plans))
    caches = sum(plan.cache_bytes for step, plan in shared.values() if step.stage.record is TeacherCache)
    hours, kept = seconds * factor / HOUR_S, int(count * mean(map(_kept_bytes, plans)) + caches)
    of_teachers = len({plan.step(TeacherCache).key for plan in plans})
    return Estimate(
        trials=trials,
        left=count,
        shared_steps=len(shared),
        worker_hours=hours,
        hours_basis=basis,
        bytes=kept,
        bytes_basis="4 bytes a parameter for each student and its bits for the package, and each cache that is missing",
        requests=asked,
        cost=money(planned.config.resources.prices, hours, kept, asked),
        caching=compared(planned.base, rates, count / of_teachers) if count else None,
    )


def _timed(planned: SweepPlan) -> tuple[list[float], str]:
    """Return the worker-seconds of a row of distillation, where trials or students were timed, and what was."""
    measured = [
        trial.worker_seconds / trained_rows(known.plan.config.distill, known.plan.rows)
        for known in planned.known
        if (trial := planned.trials.get(known.key)) is not None and trial.status == "done" and trial.seconds > 0
    ]
    if measured:
        return measured, "trials of this sweep"
    return timed_before(planned.base), "students of this teacher in the store"


def _kept_bytes(plan: RunPlan) -> int:
    bits = BitWidths.parse(plan.config.quant.bits)
    return int(plan.parameters * (4 + max(bits.weights, bits.embedding) / 8))
