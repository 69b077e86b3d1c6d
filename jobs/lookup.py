"""`bitmill lookup`: the registered models that meet constraints, or how near the nearest ones are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.metrics import METRICS, printed
from pipeline.tracking.lookup import matches, nearest_misses, reach
from pipeline.tracking.query import NearMiss, Query, RegisteredModel, of_text

SHARES = {metric.name for metric in METRICS.values() if metric.form.endswith("%")}  # others are shown with four digits


def lookup(
    wanted: Query, order_by: str | None, limit: int | None, tracking_uri: str, console: Console
) -> list[dict[str, Any]]:
    """Print what fits, the best first; returns the document of `--json`, empty if nothing fits. Raises ConfigError if
    the registry cannot be reached, or for a value that can match nothing."""
    client = reach(tracking_uri)
    models = matches(client, wanted, order_by, limit)
    if models:
        print_found(models, order_by or wanted.measure, console)
    else:
        print_misses(nearest_misses(client, wanted), console)
    return [asdict(model) for model in models]


def print_found(models: list[RegisteredModel], metric: str, console: Console) -> None:
    """Print a table of models, with the metrics that any of them has, the one they are ordered by first: of validation,
    which finds and orders, and of the test split, where they differ."""
    shown = list(dict.fromkeys([metric, "perplexity", "accuracy", "rougeL"]))
    shown = [name for name in shown if name != "size_mib" and any(name in model.metrics for model in models)]
    measured = [(name, split) for name in shown for split in ("validation", "test") if of_text(name) or split == "test"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("bits", "quantizer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MiB", *(f"{name}\n{split}" if of_text(name) else name for name, split in measured)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("created", no_wrap=True)
    table.add_column("formats", overflow="fold")
    for model in models:
        name = " ".join([f"{model.name}/{model.version}", *(f"@{alias}" for alias in model.aliases)])
        size = "" if model.size_mib is None else f"{model.size_mib:.2f}"
        values = [
            printed(name if name in SHARES else "", (model.metrics if split == "test" else model.validation).get(name))
            for name, split in measured
        ]
        cells = (name, model.bits, model.quantizer, size, *values, model.created_at[:10], " ".join(model.formats))
        table.add_row(*cells)
    console.print(table)
    best = models[0]
    for command in (f"bitmill pull {best.name}/{best.version} DEST", f"package: {best.package_uri}"):
        console.print(f"  {command}", soft_wrap=True)


def print_misses(misses: list[NearMiss], console: Console) -> None:
    """Print why nothing fits."""
    if not misses:
        console.print("nothing matched: no model of bitmill is registered here")
        return
    console.print("nothing matched; the nearest:")
    for miss in misses:
        line = f"  {miss.model.name}/{miss.model.version} ({miss.model.bits}): {'; '.join(miss.reasons)}"
        console.print(line, soft_wrap=True)
