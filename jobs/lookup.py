"""`bitmill lookup`: the registered models that meet constraints, or how near the nearest ones are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.tracking.lookup import matches, nearest, reach
from pipeline.tracking.query import Found, Miss, Wanted

SHARES = ("accuracy", "top1_agreement")


def lookup(
    wanted: Wanted, order_by: str | None, limit: int | None, tracking_uri: str, console: Console
) -> list[dict[str, Any]]:
    """Print what fits, the best first; returns the document of `--json`, empty if nothing fits.

    Raises:
        ConfigError: the registry cannot be reached, or a value that can match nothing.
    """
    client = reach(tracking_uri)
    found = matches(client, wanted, order_by, limit)
    if found:
        print_found(found, order_by or wanted.measure, console)
    else:
        print_misses(nearest(client, wanted), console)
    return [asdict(one) for one in found]


def print_found(found: list[Found], metric: str, console: Console) -> None:
    """A table of models, with the metrics that any of them has, the one they are ordered by first."""
    shown = list(dict.fromkeys([metric, "perplexity", "accuracy", "rougeL"]))
    shown = [name for name in shown if name != "size_mib" and any(name in one.metrics for one in found)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("bits", "quantizer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MiB", *shown):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("created", no_wrap=True)
    table.add_column("formats", overflow="fold")
    for one in found:
        name = " ".join([f"{one.name}/{one.version}", *(f"@{alias}" for alias in one.aliases)])
        size = "" if one.size_mib is None else f"{one.size_mib:.2f}"
        values = [_metric(name, one.metrics.get(name)) for name in shown]
        cells = (name, one.bits, one.quantizer, size, *values, one.created_at[:10], " ".join(one.formats))
        table.add_row(*map(escape, cells))
    console.print(table)
    best = found[0]
    for command in (f"bitmill pull {best.name}/{best.version} DEST", f"package: {best.package_uri}"):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def print_misses(misses: list[Miss], console: Console) -> None:
    """Why nothing fits."""
    if not misses:
        console.print("nothing matched: no model of bitmill is registered here")
        return
    console.print("nothing matched; the nearest:")
    for miss in misses:
        reasons = "; ".join(miss.reasons)
        line = f"  {miss.found.name}/{miss.found.version} ({miss.found.bits}): {reasons}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in SHARES else f"{value:.4g}"
