"""`bitmill history`: every tick of a registered name and what was decided, as a table; a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.display import print_table
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.metrics import printed
from pipeline.retrain.decisions import Decision, Decisions
from pipeline.retrain.ticks import TickLog, Ticks, timeline

HEADER = ("when", "decision", "champion", "challenger", "measured on test", "bytes", "reason")


def history(name: str, out: Path | None, resources: Resources, console: Console) -> dict[str, Any]:
    """Print ticks and decisions, the first one first, and draw them to `out`, a PNG; returns the document of `--json`.
    Raises ConfigError if there are none, or the picture cannot be written."""
    if out is not None and out.suffix != ".png":
        raise ConfigError(f"--out is {str(out)!r}; it takes a name that ends in .png")
    kept = Decisions.of(name, resources)
    decisions, ticks = [*kept.all()][::-1], TickLog(kept).all()
    if not decisions and not ticks:
        raise ConfigError(
            f"Nothing was decided on {name!r} in this store yet. `bitmill retrain CONFIG` decides; --storage-uri and "
            "--namespace name the store."
        )
    print_table(console, HEADER, map(cells, timeline(decisions, ticks)), title=name)
    document: dict[str, Any] = {
        "name": name,
        "decisions": [decision.model_dump(mode="json") for decision in decisions],
        "ticks": [line.model_dump(mode="json") for line in ticks],  # that decided nothing
    }
    if out is None:
        return document
    from jobs.report.files import history_picture  # matplotlib, for those who draw

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(history_picture(name, decisions))
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written to: {error}") from error
    console.print(f"  {out}", soft_wrap=True)
    return {**document, "picture": str(out)}


def cells(decision: Decision | Ticks) -> tuple[str, ...]:
    """Return the cells of `HEADER`: of the measure the champion's, then the challenger's; those of ticks that decided
    nothing are of a line of them."""
    if isinstance(decision, Ticks):
        return (decision.at, decision.outcome, "", "", "", "", decision.told())
    scores = [
        decision.scores[side].get(decision.measure) for side in ("champion", "challenger") if side in decision.scores
    ]
    return (
        decision.at,
        decision.decision,
        str(decision.champion or ""),
        str(decision.challenger or ""),
        f"{decision.measure} {' -> '.join(printed(decision.measure, score) for score in scores)}" if scores else "",
        printed("packed_bytes", decision.packed_bytes),
        decision.reason,
    )
