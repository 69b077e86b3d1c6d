"""`bitmill sweep`: the trade-off between bytes and accuracy, one trial a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column

from jobs.compress import MIB, NOT_COUNTED, print_costs, print_shared, store_options
from jobs.display import Display, print_table, print_warnings
from pipeline.config.laid_over import label
from pipeline.config.run import Config
from pipeline.metrics import gap_nats
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.records import Tokens, Trial
from pipeline.sweep.cost import Estimate, estimate
from pipeline.sweep.queue import PlannedTrial
from pipeline.sweep.run import PAGE, SweepPlan, SweepResult, parent_of, plan_sweep, run_sweep
from pipeline.tracking import runs


def sweep(
    config: Config, console: Console, *, only_plan: bool, wait: bool, retry_failed: bool = False
) -> dict[str, Any]:
    """Run (or only plan) and print for people on `console`; returns the document of `--json`."""
    with console.status("planning") if console.is_terminal else nullcontext():
        planned = plan_sweep(config, retry_failed)
    print_warnings(console, _warnings(planned))
    if only_plan:
        guess = estimate(planned)
        print_plan(planned, guess, console)
        return plan_document(planned, guess)
    with Display(console) as display:
        result = run_sweep(planned, display, wait)
    print_result(planned, result, console)
    begun = any(trial.student or trial.last for trial in result.trials)  # else there is nothing to show
    report_uri = show(planned) if result.complete and begun else None
    if report_uri:
        console.print(f"the sweep as a page: {report_uri}", soft_wrap=True)
    if result.untold:
        console.print(result.untold)
    return document(planned, result, report_uri)


def show(planned: SweepPlan) -> str:
    """Store the report on a finished sweep with its last attempt's files and in its MLflow run, once. Returns where it
    lies. Raises FencedOffError if the sweep is being run again."""
    last = planned.step_dir.last_attempt()
    if last.place(PAGE) not in last.sizes(PAGE):
        from jobs.report import rendered  # draws, which a plan need not import
        from jobs.report.reader import Reader

        resources = planned.config.resources
        files = rendered(
            Reader(storage_uri(resources), scratch_dir(resources), resources.local_cache_gib).content(planned.key)
        )
        runs.log_page(parent_of(planned), PAGE, files[".html"].decode())
        for suffix in (".png", ".csv", ".html"):  # the page last: where it is, all is
            last.write(f"report{suffix}", files[suffix])
    return last.uri + last.place(PAGE)


def document(planned: SweepPlan, result: SweepResult, report_uri: str | None) -> dict[str, Any]:
    """Return the document of `--json`."""
    return {
        "sweep_key": planned.key,
        "trials": [_trial(trial) for trial in result.trials],
        "front": list(result.front),
        "complete": result.complete,
        "worker_hours": round(result.spent_hours, 4),
        "report_uri": report_uri,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    scored: set[str] = {"teacher", "student", "validation"} if trial.student else set()
    return {
        "trial_key": trial.key,
        "bits": trial.bits,
        "params": trial.values,
        "status": trial.status,
        "metrics": trial.model_dump(include=scored),
        "last": trial.last,
        "size": trial.size.model_dump(exclude={"paper_bytes"}) if trial.size else None,
        "model_version": trial.version,
        "seconds": round(trial.seconds, 1),
        "failure": trial.failure,
    }


def plan_document(planned: SweepPlan, guess: Estimate) -> dict[str, Any]:
    """Return the document of `--plan --json`."""
    trials = [{"trial_key": t.key, "params": t.values, "status": _status(planned, t.key)} for t in _known(planned)]
    facts = {**asdict(guess), "count": guess.trials, "trials": trials, "warnings": _warnings(planned)}
    return {"sweep_key": planned.key, **facts}


def _warnings(planned: SweepPlan) -> list[str]:
    """Return the warnings of what the trials share and of those known, each once, unless nothing is left to run."""
    plans = [] if planned.record is not None else [planned.base, *(trial.plan for trial in planned.known)]
    return list(dict.fromkeys(warning for plan in plans for warning in plan.warnings))


def print_plan(planned: SweepPlan, guess: Estimate, console: Console) -> None:
    """Print the trials and what they would cost, for people."""
    rows = [(label(trial.values), trial.key[:12], _status(planned, trial.key)) for trial in _known(planned)]
    if rows:
        print_table(console, ("trial", "key", "status"), rows)
    console.print(
        f"{guess.trials} trials, {guess.left} of them to run, {guess.shared_steps} shared steps before them\n"
        f"worker-hours: about {guess.worker_hours:.3g} ({guess.hours_basis}); {NOT_COUNTED}\n"
        f"bytes: about {guess.bytes / MIB:,.1f} MiB ({guess.bytes_basis})",
        soft_wrap=True,
    )
    print_costs(guess.requests, guess.cost, guess.caching, console)
    cap = planned.config.resources.max_worker_hours
    if cap is not None:
        console.print(f"no trial starts once {cap:g} worker-hours are used, shared steps included")
    print_shared(planned.base.overlap, console)


def _known(planned: SweepPlan) -> Sequence[Trial | PlannedTrial]:
    return planned.known or (planned.record.trials if planned.record else ())


def _status(planned: SweepPlan, key: str) -> str:
    trial = planned.trials.get(key)
    return "to run" if trial is None or trial.status == "running" else trial.status


def print_result(planned: SweepPlan, result: SweepResult, console: Console) -> None:
    """Print every trial and what is left to do, for people."""
    headings = ("status", "gap, nats:\nvalidation", "\ntest", "perplexity:\ntest", "bytes", "smaller by", "version")
    trials = sorted(result.trials, key=lambda trial: trial.size.packed_bytes if trial.size else math.inf)
    rows = [(*_row(trial), "*" if trial.key in result.front else "") for trial in trials]
    print_table(console, (Column("trial", no_wrap=True), *headings, "front, by\nvalidation"), rows)
    print_shared(tokens.overlap if (tokens := planned.base.step(Tokens).dir.record(Tokens)) else None, console)
    for trial in result.trials:
        if trial.failure:
            console.print(f"{label(trial.values)}: {trial.failure}", soft_wrap=True)
    if any(trial.status == "failed" for trial in result.trials):
        console.print("--retry-failed runs those that failed again")
    for name, reason in result.unfinished:
        console.print(f"{name}: not finished. {reason}", soft_wrap=True)
    if not result.complete:
        page = f"As a page: bitmill report {planned.key} --out report.html{store_options(planned.config.resources)}"
        console.print(
            f"stopped: {result.spent_hours:.2f} worker-hours are used of resources.max_worker_hours "
            f"({planned.config.resources.max_worker_hours:g}); the table is the best so far. Raise it and give the "
            f"same command to go on. {page if result.trials else ''}",
            soft_wrap=True,
        )


def _row(trial: Trial) -> list[str]:
    if trial.size is None:
        last = f"{trial.last['validation_nats']:.3f} nats at step {trial.last['step']:.0f}" if trial.last else ""
        return [label(trial.values), trial.status, last, "", "", "", "", ""]
    gaps = [gap_nats(**trial.validation), gap_nats(trial.teacher, trial.student)]
    version = f"{trial.version['name']}/{trial.version['version']}" if trial.version else "not registered"
    numbers = [*(f"{gap:.4f}" for gap in gaps), f"{trial.student['perplexity']:.2f}", f"{trial.size.packed_bytes:,}"]
    return [label(trial.values), trial.status, *numbers, f"{trial.size.ratio:.1f}x", version]
