"""`bitmill compress`: text and a teacher in, a registered packed model out."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.display import Display
from pipeline.config.presets import set_otherwise
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.flow.run import Outcome, Plan, plan, run, target_of
from pipeline.store.locations import tracking_uri
from pipeline.store.records import ModelVersion, Package, Record, Report, Student, Teacher, Tokens
from pipeline.tasks import task_of
from pipeline.tracking.outbox import LiveRun, Outbox, load_watched, outbox_folder, send_waiting
from pipeline.tracking.runs import sqlite_file

MIB = 2**20
FORMS = {
    "accuracy": ".1%",
    "rouge1": ".2f",
    "rouge2": ".2f",
    "rougeL": ".2f",
    "perplexity": ".2f",
    "bits_per_byte": ".4f",
}


def compress(config: Config, path: str, console: Console, *, until: str, only_plan: bool, wait: bool) -> dict[str, Any]:
    """Run (or only plan) and print for people on `console`; returns the document of `--json`."""
    with console.status("planning") if console.is_terminal else nullcontext():
        planned = plan(config, until)
    if said := preset_note(config):
        console.print(said, highlight=False)
    if only_plan:
        print_plan(planned, console)
        return plan_document(planned)
    outcome = _run(planned, console, wait)
    document = outcome_document(planned, outcome)
    print_outcome(planned, outcome, path, console)
    return document


def preset_note(config: Config) -> str:
    """What the configuration changes of its preset, which then is not what was measured."""
    if config.preset is None:
        return ""
    changed = set_otherwise(config.model_dump(), config.preset)
    listed = ", ".join(f"{path} {own} (preset: {value})" for path, (own, value) in changed.items())
    return f"preset {config.preset} with other values: {listed}" if listed else ""


def _run(planned: Plan, console: Console, wait: bool) -> Outcome:
    """Run what is left; curves go to MLflow meanwhile, if the run ends there and there is something to train."""
    trained = any(step.record is None for step in planned.steps if step.stage in (Teacher.stage, Student.stage))
    if not trained or planned.steps[-1].stage != ModelVersion.stage:
        with Display(console) as display:
            outcome = run(planned, display, wait)
        if untold := send_waiting(planned.config.resources):
            console.print(untold, highlight=False)
        return outcome
    target = target_of(planned, f"{planned.config.name} {planned.config.quant.bits}", None)
    outbox = Outbox(outbox_folder(planned.config.resources))
    try:
        with Display(console) as display, outbox, load_watched(outbox, target):
            return run(planned, LiveRun(display, outbox, target), wait)
    finally:
        if outbox.unsent:
            console.print(outbox.told(), highlight=False)


def plan_document(planned: Plan) -> dict[str, Any]:
    steps = [
        {
            "stage": step.stage,
            "key": step.place.key,
            "status": "run" if step.record is None else "reused",
            "reason": step.reason,
            "uri": step.place.uri,
        }
        for step in planned.steps
    ]
    return {
        "run_key": planned.run_key,
        "stages": steps,
        "rows": planned.rows,
        "rows_are_exact": planned.rows_are_exact,
        "parameters": planned.parameters,
        "cache_bytes": planned.cache_bytes,
        "cache_mode": planned.cache_reason,
    }


def print_plan(planned: Plan, console: Console) -> None:
    table = Table("stage", "key", "status", "why")
    for step in planned.steps:
        status = "[yellow]would run[/]" if step.record is None else "[green]reused[/]"
        table.add_row(step.stage, step.place.key[:12], status, step.reason)
    console.print(table)
    about = "" if planned.rows_are_exact else "about "
    console.print(
        f"{about}{planned.rows:,} rows to train on ({planned.shape}); "
        f"{planned.parameters:,} parameters; cache {about}{planned.cache_bytes / MIB:,.1f} MiB"
    )
    console.print(f"cache mode {planned.cache_reason}", highlight=False)


def outcome_document(planned: Plan, outcome: Outcome) -> dict[str, Any]:
    records: dict[str, Record] = {stage: done.record for stage, done in outcome.done.items()}
    report, package, version = records.get("evaluate"), records.get("pack"), records.get("register")
    document: dict[str, Any] = {
        "run_key": planned.run_key,
        "stages": [
            {
                "stage": step.stage,
                "key": step.place.key,
                "status": outcome.status[step.stage],
                "seconds": round(outcome.seconds[step.stage], 3),
                "uri": step.place.uri,
            }
            for step in planned.steps
        ],
        "metrics": None,
        "size": None,
        "package_uri": None,
        "model_version": None,
    }
    if isinstance(report, Report):
        document["metrics"] = {"teacher": report.teacher, "student": report.student}
    if isinstance(package, Package):
        document["size"] = package.size.model_dump(exclude={"paper_bytes"})
        document["package_uri"] = planned.step("pack").place.uri_of(Package.FOLDER)
    if isinstance(version, ModelVersion):
        aliases = list(version.aliases)
        document["model_version"] = {"name": version.name, "version": version.version, "aliases": aliases}
    return document


def store_options(resources: Resources) -> str:
    """Options that name a store other than the default."""
    named = {"--storage-uri": resources.storage_uri, "--namespace": resources.namespace}
    defaults = {"--storage-uri": Resources().storage_uri, "--namespace": ""}
    return "".join(f" {name} {shlex.quote(value)}" for name, value in named.items() if value != defaults[name])


def print_outcome(planned: Plan, outcome: Outcome, path: str, console: Console) -> None:
    document = outcome_document(planned, outcome)
    metrics, size, version = document["metrics"], document["size"], document["model_version"]
    if metrics is None or size is None:
        console.print(f"done as far as {planned.steps[-1].stage}: {planned.steps[-1].place.uri}", highlight=False)
        return
    table = Table("", "teacher", f"student {planned.config.quant.bits}", title=planned.config.name)
    for name, form in FORMS.items():
        if name in metrics["student"]:
            table.add_row(name, *(f"{metrics[who][name]:{form}}" for who in ("teacher", "student")))
    table.add_row("kl_nats", "", f"{metrics['student']['kl_nats']:.4f}")
    table.add_row("top1_agreement", "", f"{metrics['student']['top1_agreement']:.1%}")
    table.add_row("bytes", f"{size['teacher_bytes']:,}", f"{size['packed_bytes']:,}")
    table.add_row("ratio", "", f"{size['ratio']:.1f}x (the paper's counting: {size['paper_ratio']:.1f}x)")
    if version is not None:
        aliases = "".join(f" @{alias}" for alias in version["aliases"])
        table.add_row("registered", "", f"{version['name']} version {version['version']}{aliases}")
    console.print(table)
    console.print(f"package: {document['package_uri']}", highlight=False, soft_wrap=True)
    console.print("\nTry next:")
    other_bits = "4-4-8" if planned.config.quant.bits != "4-4-8" else "8-8-8"
    tracking = tracking_uri(planned.config.resources)
    commands = [
        f"bitmill compress {shlex.quote(path)} --bits {other_bits}",
        f"bitmill report {planned.run_key} --out report.html{store_options(planned.config.resources)}",
        f"mlflow ui --backend-store-uri {tracking}" if sqlite_file(tracking) else "bitmill compress --help",
    ]
    recipe = planned.step(Tokens.stage).recipe
    if task_of(recipe).columns(recipe["data"]) is None:  # a model of running text can be scored on any other
        data = shlex.quote(planned.config.data.source)
        commands.insert(0, f"bitmill evaluate {shlex.quote(document['package_uri'])} --data {data}")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
