"""`bitmill sweep`: the trade-off between bytes and accuracy, one trial a row."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.compress import MIB, store_options
from jobs.display import Display
from jobs.report import rendered
from jobs.report.reader import Reader
from pipeline.config.run import Config
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.objects import open_objects
from pipeline.store.records import Trial
from pipeline.sweep.cost import Estimate, estimate
from pipeline.sweep.run import PAGE, Found, SweepPlan, parent_of, plan, run
from pipeline.sweep.trials import label
from pipeline.tracking import runs


def sweep(
    config: Config, console: Console, *, only_plan: bool, wait: bool, retry_failed: bool = False
) -> dict[str, Any]:
    """Run (or only plan) and print for people on `console`; returns the document of `--json`."""
    with console.status("planning") if console.is_terminal else nullcontext():
        planned = plan(config, retry_failed)
    if only_plan:
        guess = estimate(planned)
        print_plan(planned, guess, console)
        return plan_document(planned, guess)
    with Display(console) as display:
        found = run(planned, display, wait)
    print_found(planned, found, console)
    begun = any(trial.student or trial.last for trial in found.trials)  # else there is nothing to show
    report_uri = show(planned) if found.complete and begun else None
    if report_uri:
        console.print(f"the sweep as a page: {report_uri}", highlight=False, soft_wrap=True)
    if found.untold:
        console.print(found.untold, highlight=False)
    return document(planned, found, report_uri)


def show(planned: SweepPlan) -> str:
    """The report on a finished sweep, beside its record and in its MLflow run; made once. Returns where it lies."""
    objects = open_objects(planned.place.uri)
    if PAGE not in objects.sizes(""):
        resources = planned.config.resources
        files = rendered(Reader(storage_uri(resources), scratch_dir(resources)).content(planned.key))
        runs.log_page(parent_of(planned), PAGE, files[".html"].decode())
        for suffix in (".png", ".csv", ".html"):  # the page last: where it is, all is
            objects.write(f"report{suffix}", files[suffix])
    return planned.place.uri_of(PAGE)


def document(planned: SweepPlan, found: Found, report_uri: str | None) -> dict[str, Any]:
    return {
        "sweep_key": planned.key,
        "trials": [_trial(trial) for trial in found.trials],
        "front": list(found.front),
        "complete": found.complete,
        "worker_hours": round(found.spent_hours, 4),
        "report_uri": report_uri,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    metrics: dict[str, Any] = {"teacher": trial.teacher, "student": trial.student} if trial.student else {}
    return {
        "trial_key": trial.key,
        "bits": trial.bits,
        "params": trial.values,
        "status": trial.status,
        "metrics": metrics | ({"validation": trial.last} if trial.last else {}),
        "size": trial.size.model_dump(exclude={"paper_bytes"}) if trial.size else None,
        "model_version": trial.version,
        "seconds": round(trial.seconds, 1),
        "failure": trial.failure,
    }


def plan_document(planned: SweepPlan, guess: Estimate) -> dict[str, Any]:
    known = [(one.key, one.values) for one in planned.known or (planned.record.trials if planned.record else ())]
    trials = [{"trial_key": key, "params": values, "status": _status(planned, key)} for key, values in known]
    return {"sweep_key": planned.key, **vars(guess), "count": guess.trials, "trials": trials}


def print_plan(planned: SweepPlan, guess: Estimate, console: Console) -> None:
    table = Table("trial", "key", "status")
    known = planned.known or (planned.record.trials if planned.record else ())
    for one in known:
        table.add_row(label(one.values), one.key[:12], _status(planned, one.key))
    if known:
        console.print(table)
    console.print(
        f"{guess.trials} trials, {guess.left} of them to run, {guess.shared_steps} shared steps before them\n"
        f"worker-hours: about {guess.worker_hours:.2f} ({guess.hours_basis})\n"
        f"bytes: about {guess.bytes / MIB:,.1f} MiB ({guess.bytes_basis})",
        highlight=False,
        soft_wrap=True,
    )
    cap = planned.config.resources.max_worker_hours
    if cap is not None:
        console.print(f"no trial starts once {cap:g} worker-hours are used, shared steps included", highlight=False)


def _status(planned: SweepPlan, key: str) -> str:
    trial = planned.trials.get(key)
    return "to run" if trial is None or trial.status == "running" else trial.status


def print_found(planned: SweepPlan, found: Found, console: Console) -> None:
    table = Table()
    for column in ("trial", "status", "perplexity", "gap, nats", "bytes", "smaller by", "version", "front"):
        table.add_column(column, no_wrap=column == "trial")
    for trial in sorted(found.trials, key=lambda trial: trial.size.packed_bytes if trial.size else math.inf):
        table.add_row(*_row(trial), "*" if trial.key in found.front else "")
    console.print(table)
    for trial in found.trials:
        if trial.failure:
            console.print(f"{label(trial.values)}: {trial.failure}", highlight=False, soft_wrap=True)
    if any(trial.status == "failed" for trial in found.trials):
        console.print("--retry-failed runs those that failed again", highlight=False)
    for name, reason in found.unfinished:
        console.print(f"{name}: not finished. {reason}", highlight=False, soft_wrap=True)
    if not found.complete:
        console.print(
            f"stopped: {found.spent_hours:.2f} worker-hours are used of resources.max_worker_hours "
            f"({planned.config.resources.max_worker_hours:g}); the table is the best so far. Raise it and give the "
            f"same command to go on. {_as_page(planned) if found.trials else ''}",
            soft_wrap=True,
        )


def _as_page(planned: SweepPlan) -> str:
    return f"As a page: bitmill report {planned.key} --out report.html{store_options(planned.config.resources)}"


def _row(trial: Trial) -> list[str]:
    if trial.size is None:
        last = f"{trial.last['validation_nats']:.3f} nats at step {trial.last['step']:.0f}" if trial.last else ""
        return [label(trial.values), trial.status, last, "", "", "", ""]
    gap = math.log(trial.student["perplexity"] / trial.teacher["perplexity"])
    version = f"{trial.version['name']}/{trial.version['version']}" if trial.version else "not registered"
    numbers = [f"{trial.student['perplexity']:.2f}", f"{gap:.4f}", f"{trial.size.packed_bytes:,}"]
    return [label(trial.values), trial.status, *numbers, f"{trial.size.ratio:.1f}x", version]
