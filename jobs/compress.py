"""`bitmill compress`: text and a teacher in, a registered packed model out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.display import Display, check_page, print_table, print_warnings
from pipeline.config.presets import set_otherwise
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.capacity import GIB, HOUR_S, Caching, Estimate, estimate
from pipeline.flow.plan import RunPlan, plan_run, reasons, target_of
from pipeline.flow.requests import Requests
from pipeline.flow.run import Outcome, run_plan
from pipeline.metrics import METRICS, measure_of, printed
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Evaluation, ModelVersion, Overlap, Package, Student, Teacher, Tokens
from pipeline.tasks import task_of
from pipeline.tracking.listener import Listener
from pipeline.tracking.mlflow_listener import MlflowListener, load_watched
from pipeline.tracking.outbox import Outbox, outbox_folder, send_waiting
from pipeline.tracking.runs import sqlite_file

MIB = 2**20
WHO = ("teacher", "student")
NOT_COUNTED = "validations, scores and compilation are not counted"


def compress(
    config: Config, path: str, console: Console, *, until: str, only_plan: bool, wait: bool, page: str | None = None
) -> dict[str, Any]:
    """Run (or only plan) and print for people on `console`; returns the document of `--json`."""
    with console.status("planning") if console.is_terminal else nullcontext():
        planned = plan_run(config, until)
    if config.preset is not None and (changed := set_otherwise(config.model_dump(), config.preset)):
        listed = ", ".join(f"{path} {own} (preset: {value})" for path, (own, value) in changed.items())
        console.print(f"preset {config.preset} with other values: {listed}")  # which is then not what was measured
    print_warnings(console, planned.warnings)
    if only_plan:
        guess = estimate(planned)
        print_plan(planned, document := plan_document(planned, guess), console)
        print_estimate(guess, console)
        return document
    if page is not None:
        if not planned.ends_with(ModelVersion):
            raise ConfigError(
                f"--report {page} shows a whole run, and --until {until} ends before; leave one of them out."
            )
        check_page(Path(page), "--report")
    outcome = _run(planned, console, wait)
    document = outcome_document(planned, outcome)
    print_shared(outcome.finished(Tokens).record.overlap, console)
    if planned.pinned.packed:
        console.print(f"rows are filled to {document['fill']:.1%}")
    print_outcome(planned, document, path, console)
    if page is not None:
        from jobs.report import report  # draws, which a run without a page need not import

        document["report"] = report(planned.run_key, Path(page), config.resources, console)["files"]["html"]
    return document


def _run(planned: RunPlan, console: Console, wait: bool) -> Outcome:
    """Run what is left, shown on the console."""
    with watched(planned, console) as listener:
        return run_plan(planned, listener, wait)


@contextmanager
def watched(planned: RunPlan, console: Console) -> Iterator[Listener]:
    """Yield a listener that shows a run; curves go to MLflow meanwhile, if the run ends there and there is something to
    train."""
    trained = any(step.stage.record in (Teacher, Student) for step in planned.left)
    if not trained or not planned.ends_with(ModelVersion):
        with Display(console) as display:
            yield display
        if untold := send_waiting(planned.config.resources):
            console.print(untold)
        return
    target = target_of(planned, f"{planned.config.name} {planned.config.quant.bits}", None)
    outbox = Outbox(outbox_folder(planned.config.resources))
    try:
        with Display(console) as display, outbox, load_watched(outbox, target):
            yield MlflowListener(display, outbox, target)
    finally:
        if outbox.unsent:
            console.print(outbox.told())


def plan_document(planned: RunPlan, guess: Estimate) -> dict[str, Any]:
    """Return the document of `--plan --json`."""
    why = reasons(planned)
    facts = {s.name: {"status": "reused" if s.record else "run", "reason": why[s.name]} for s in planned.steps}
    return _begun(planned, facts) | {
        "rows": planned.rows,
        "rows_are_exact": planned.tokens is not None,
        "fill": planned.fill(planned.tokens),
        "parameters": planned.parameters,
        "cache_bytes": planned.cache_bytes,
        "cache_mode": planned.cache_mode[1],
        "free_bytes": planned.steps[0].dir.free_bytes(),
        "shared": planned.overlap and planned.overlap.shared,
        "warnings": planned.warnings,
        "estimate": {**asdict(guess), "worker_hours": guess.worker_hours, "requests": asdict(guess.requests)},
    }


def _begun(planned: RunPlan, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how both documents begin; `facts` are of each stage."""
    steps = [{"stage": s.name, "key": s.key, **facts[s.name], "uri": s.dir.uri} for s in planned.steps]
    return {"run_key": planned.run_key, "stages": steps}


def print_plan(planned: RunPlan, document: dict[str, Any], console: Console) -> None:
    """Print what would run and why, for people."""
    status = {"run": Text("would run", "yellow"), "reused": Text("reused", "green")}
    rows = [(s["stage"], s["key"][:12], status[s["status"]], s["reason"]) for s in document["stages"]]
    print_table(console, ("stage", "key", "status", "why"), rows)
    about = "" if planned.tokens is not None else "about "
    filled = "" if document["fill"] is None else f", {document['fill']:.1%} filled"
    console.print(
        f"{about}{planned.rows:,} rows to train on ({planned.pinned.task.shape}{filled}); "
        f"{planned.parameters:,} parameters; cache {about}{planned.cache_bytes / MIB:,.1f} MiB"
    )
    console.print(f"cache mode {planned.cache_mode[1]}; {document['free_bytes'] / GIB:,.1f} GiB are free here")
    print_shared(planned.overlap, console)


def print_estimate(guess: Estimate, console: Console) -> None:
    """Print what the steps take that are left, and on what the numbers rest."""
    rows = [
        (
            name,
            f"{cost.tokens:,.0f}" if cost.tokens else "",
            f"{cost.steps:,}" if cost.steps else "",
            f"{cost.worker_seconds / HOUR_S:,.3g}" if cost.worker_seconds else "",
            _asked(cost.requests),
        )
        for name, cost in guess.steps.items()
        if cost.tokens or cost.requests.reads
    ]
    if rows:
        print_table(console, ("estimate", "tokens", "steps", "worker-hours", "S3 writes, reads"), rows)
        console.print(f"worker-hours: about {guess.worker_hours:.3g} ({guess.basis}); {NOT_COUNTED}", soft_wrap=True)
    print_costs(guess.requests, guess.cost, guess.caching, console)


def print_costs(asked: Requests, cost: float | None, caching: Caching | None, console: Console) -> None:
    """Print requests, money, and whether a cache is worth it, as far as they are known."""
    if asked.reads:
        console.print(f"requests to S3: about {_asked(asked)} (writes, reads), each node a worker's", soft_wrap=True)
    if cost is not None:
        console.print(f"cost: about {cost:,.2f}, by resources.prices", soft_wrap=True)
    if caching is not None:
        console.print(caching.told, soft_wrap=True)


def _asked(asked: Requests) -> str:
    return f"{asked.writes:,.0f}, {asked.reads:,.0f}" if asked.reads else ""


def print_shared(overlap: Overlap | None, console: Console) -> None:
    """Print in one line which documents several splits hold, if there are any."""
    if overlap is None:
        return
    about = "about " if overlap.compared < 1 else ""
    told = [
        f"{about}{count:,} of {overlap.documents[split]:,} documents of the {split} split are in the {other} split too"
        for split, shared in overlap.shared.items()
        for other, count in shared.items()
    ]
    if told:
        console.print("; ".join(told), soft_wrap=True)


def outcome_document(planned: RunPlan, outcome: Outcome) -> dict[str, Any]:
    """Return the document of `--json`."""
    facts = {s: {"status": status, "seconds": round(outcome.seconds[s], 3)} for s, status in outcome.status.items()}
    document = _begun(planned, facts) | dict.fromkeys(("metrics", "size", "package_uri", "model_version"))
    tokens = outcome.finished(Tokens).record
    document |= {"shared": tokens.overlap.shared, "fill": planned.fill(tokens)}
    for step in outcome.steps.values():
        record = step.record
        if isinstance(record, Evaluation):
            document["metrics"] = record.model_dump(include={"teacher", "student", "validation"})
        elif isinstance(record, Package):
            document["size"] = record.size.model_dump(exclude={"paper_bytes"})
            document["package_uri"] = step.folder_uri
        elif isinstance(record, ModelVersion):
            document["model_version"] = {"name": record.name, "version": record.version, "aliases": [*record.aliases]}
    return document


def store_options(resources: Resources) -> str:
    """Return the options that name a store other than the default."""
    named = {"--storage-uri": resources.storage_uri, "--namespace": resources.namespace}
    defaults = {"--storage-uri": Resources().storage_uri, "--namespace": None}
    return "".join(
        f" {name} {shlex.quote(value)}" for name, value in named.items() if value not in (None, defaults[name])
    )


def print_outcome(planned: RunPlan, document: dict[str, Any], path: str, console: Console) -> None:
    """Print the scores, the package and what to do next, for people."""
    metrics, size, version = document["metrics"], document["size"], document["model_version"]
    if metrics is None or size is None:
        console.print(f"done as far as {planned.last.name}: {planned.last.dir.uri}")
        return
    rows = [
        (name, *(printed(name, metrics[who].get(name)) for who in WHO))
        for name in METRICS
        if name in metrics["student"] and name != "nats_per_token"  # which says the perplexity again
    ]
    rows += [
        (name, *(printed(name, metrics[w].get(name)) for w in WHO))
        for name in metrics["student"]
        if name not in METRICS
    ]
    chosen = metrics["validation"]
    for name in (measure_of(planned.config.task.name), *(n for n in chosen["student"] if n not in metrics["student"])):
        rows.append((f"{name}, validation", *(printed(name, chosen[who].get(name)) for who in WHO)))
    rows.append(("bytes", f"{size['teacher_bytes']:,}", f"{size['packed_bytes']:,}"))
    rows.append(("ratio", "", f"{size['ratio']:.1f}x (the paper's counting: {size['paper_ratio']:.1f}x)"))
    if version is not None:
        aliases = "".join(f" @{alias}" for alias in version["aliases"])
        rows.append(("registered", "", f"{version['name']} version {version['version']}{aliases}"))
    columns = ("test split", "teacher", f"student {planned.config.quant.bits}")
    print_table(console, columns, rows, title=planned.config.name)
    console.print(f"package: {document['package_uri']}", soft_wrap=True)
    console.print("\nTry next:")
    other_bits = "4-4-8" if planned.config.quant.bits != "4-4-8" else "8-8-8"
    tracking = tracking_uri(planned.config.resources)
    commands = [
        f"bitmill compress {shlex.quote(path)} --bits {other_bits}",
        f"bitmill report {planned.run_key} --out report.html{store_options(planned.config.resources)}",
        f"mlflow ui --backend-store-uri {tracking}" if sqlite_file(tracking) else "bitmill compress --help",
    ]
    recipe = planned.step(Tokens).recipe
    source = planned.config.data.source
    if task_of(recipe).columns(recipe["data"]) is None and isinstance(source, str):  # any other text will do as well
        data = shlex.quote(source)
        commands.insert(0, f"bitmill evaluate {shlex.quote(document['package_uri'])} --data {data}")
    console.print("\n".join(f"  {command}" for command in commands), soft_wrap=True)
