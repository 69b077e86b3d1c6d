"""`bitmill history`: every decision on a registered name, and the ticks between two of them, as a table; a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.display import print_table
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.metrics import printed
from pipeline.retrain.decisions import Decision, Decisions, Unchanged

HEADER = ("when", "decision", "champion", "challenger", "measured on test", "bytes", "reason")


def history(name: str, out: Path | None, resources: Resources, console: Console) -> dict[str, Any]:
    """Print the decisions, the first one first, and draw them to `out`, a PNG; returns the document of `--json`. Raises
    ConfigError if there are none, or the picture cannot be written."""
    if out is not None and out.suffix != ".png":
        raise ConfigError(f"--out is {str(out)!r}; it takes a name that ends in .png")
    kept = Decisions.of(name, resources)
    decisions = [*kept.all()][::-1]
    if not decisions:
        raise ConfigError(
            f"Nothing was decided on {name!r} in this store yet. `bitmill retrain CONFIG` decides; --storage-uri and "
            "--namespace name the store."
        )
    since = kept.notes().unchanged
    print_table(console, HEADER, lines(decisions, since), title=name)
    document: dict[str, Any] = {
        "name": name,
        "decisions": [decision.model_dump(mode="json") for decision in decisions],
        "unchanged": None if since is None else since.model_dump(mode="json"),  # since the last of them
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


def lines(decisions: Sequence[Decision], since: Unchanged | None) -> Iterator[tuple[str, ...]]:
    """Yield a line of `HEADER` for each decision, after one for the ticks that were unchanged since the one before it;
    `since` are those after the last."""
    for decision in decisions:
        yield from _quiet(decision.unchanged)
        yield cells(decision)
    yield from _quiet(since)


def _quiet(ticks: Unchanged | None) -> Iterator[tuple[str, ...]]:
    if ticks is not None:
        yield (ticks.first, "unchanged", "", "", "", "", ticks.told())


def cells(decision: Decision) -> tuple[str, ...]:
    """Return the cells of `HEADER`: of the measure the champion's, then the challenger's."""
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
