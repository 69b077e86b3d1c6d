"""`bitmill gc`: what nothing needs any more, by stage, and what its deletion freed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from jobs.display import print_table
from pipeline.config.resources import Resources
from pipeline.retrain.gc import Collector, Garbage

MIB = 2**20


def collect(
    resources: Resources, keep: int | None, grace_hours: float, only_plan: bool, console: Console
) -> dict[str, Any]:
    """Delete (or only find) the garbage of a store and print what and why; returns the document of `--json`."""
    collector = Collector(resources, keep, 3600 * grace_hours)
    for name, number in collector.kept_by_schedules().items():
        console.print(f"{name}: retrain.keep is {number}: so many of its newest versions keep all that made them")
    garbage = collector.find()
    gone = garbage if only_plan else collector.delete(garbage)
    groups: dict[tuple[str, str], list[Garbage]] = {}
    for item in gone:
        groups.setdefault((item.stage, item.why), []).append(item)
    rows = [(stage, f"{len(items):,}", f"{_bytes(items) / MIB:,.1f}", why) for (stage, why), items in groups.items()]
    if rows:
        print_table(console, ("stage", "count", "MiB", "why"), rows)
    done = "would go" if only_plan else "went"
    console.print(f"{len(gone):,} steps and temporary files {done}, {_bytes(gone) / MIB:,.1f} MiB")
    if len(gone) < len(garbage):
        console.print(f"{len(garbage) - len(gone):,} stayed: a command took them up meanwhile")
    stages = {stage: _bytes([item for item in gone if item.stage == stage]) for stage in {item.stage for item in gone}}
    return {"deleted": not only_plan, "bytes": _bytes(gone), "stages": stages, "garbage": [*map(asdict, gone)]}


def _bytes(items: list[Garbage]) -> int:
    return sum(item.bytes for item in items)
