"""`bitmill history`: every decision on a registered name."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.display import print_table
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.retrain.decisions import Decisions

HEADER = ("when", "decision", "champion", "challenger", "reason")


def history(name: str, resources: Resources, console: Console) -> dict[str, Any]:
    """Print the decisions, the first one first; returns the document of `--json`. Raises ConfigError if there are
    none."""
    decisions = [*Decisions(name, resources).all()][::-1]
    if not decisions:
        raise ConfigError(
            f"Nothing was decided on {name!r} in this store yet. `bitmill retrain CONFIG` decides; --storage-uri names "
            "the store."
        )
    rows = [(d.at, d.decision, str(d.champion or ""), str(d.challenger or ""), d.reason) for d in decisions]
    print_table(console, HEADER, rows, title=name)
    return {"name": name, "decisions": [decision.model_dump(mode="json") for decision in decisions]}
