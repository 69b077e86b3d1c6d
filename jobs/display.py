"""What is seen of a run on stderr: a bar for each stage on a terminal, elsewhere a line at each quarter and minute.

A log of JSON has those lines as events, and the points of curves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from jobs.log import lines_of
from pipeline.errors import ConfigError
from pipeline.execution.gauges import KEY_CHARACTERS
from pipeline.store.lease import Owner
from pipeline.store.records import Point

SILENT_S = 60.0  # at most, where bars are not drawn, while something goes on
POINTS_S = 10.0  # at least, between two lines of a stage with points
RARE = {"validation_nats", "begins", "workers", "micro_batch"}  # what points have that come always


@cache
def units() -> dict[str, str]:
    """Return the unit of each stage's progress, by its name."""
    from pipeline.flow.line import STAGES  # with Ray and MLflow, which a table needs not

    return {name: stage.unit for name, stage in STAGES.items()}


def print_table(
    console: Console, columns: Iterable[str | Column], rows: Iterable[Iterable[str | Text]], **style: Any
) -> None:
    """Print rows under their headings; `style` is of rich's Table."""
    table = Table(*columns, **style)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print each warning as a paragraph that stands out on a terminal."""
    for warning in warnings:
        console.print(warning, style="yellow", markup=False)


class Display:
    """A listener of the flow; use it as a context."""

    def __init__(self, console: Console) -> None:
        self.console, self._lines = console, lines_of(console)
        self._keys: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._printed: dict[str, int] = {}
        self._pointed: dict[str, float] = {}  # when a stage's points were written
        self._begun = self._spoke = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a stage of a command's own while inside; yield what to tell how many of how many are done."""
        begun = time.perf_counter()
        self.started(name)
        yield partial(self.advanced, name, note="")
        self.finished(name, "done", time.perf_counter() - begun)

    def named(self, stage: str, key: str) -> None:
        """Have each object of a log name the stage's step, as gauges do."""
        self._keys[stage] = key[:KEY_CHARACTERS]

    def started(self, stage: str) -> None:
        """Show a bar for the stage, or a line."""
        self._task(stage)
        self._line("started", stage, "started")

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        """Move the bar, or print a line at each quarter, after a silent minute, and where work goes on from before."""
        self._progress.update(self._task(stage), completed=done, total=total, note=note)
        quarter, went_back = 4 * done // max(1, total), done < self._done.get(stage, 0)
        self._done[stage] = done
        if went_back or quarter > self._printed.get(stage, 0) or time.perf_counter() - self._spoke >= SILENT_S:
            self._printed[stage] = quarter
            told = f"{done}/{total} {units().get(stage, '')}{', ' + note if note else ''}"
            self._line("advanced", stage, told, done=done, total=total)

    def noted(self, stage: str, note: str) -> None:
        """Say what the stage does at the moment."""
        self._progress.update(self._task(stage), note=note)
        self._line("noted", stage, note)

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        """Show nothing to people: curves are for MLflow, and the note of `advanced` says the last loss."""
        if self._lines is None:
            return
        for point in points:
            if RARE.isdisjoint(point):
                if (now := time.perf_counter()) - self._pointed.get(stage, -POINTS_S) < POINTS_S:
                    continue
                self._pointed[stage] = now
            self._lines.tell("measured", stage=stage, key=self._keys.get(stage), **point)

    def finished(self, stage: str, status: str, seconds: float) -> None:
        """Show that the stage is done or was reused."""
        text = "reused" if status == "reused" else f"done in {seconds:.1f} s"
        self._line("finished", stage, text, status=status, seconds=round(seconds, 3))
        task = self._task(stage)
        total = self._progress.tasks[task].total or 1
        self._progress.update(task, completed=total, total=total, note=text)
        self._progress.stop_task(task)

    def waiting(self, stage: str, owner: Owner) -> None:
        """Say whom the command waits for."""
        told = f"waiting for {owner}, which runs this very step"
        if self._lines is None:
            self.console.print(f"{stage}: {told}")
        else:
            self._lines.tell("waiting", stage=stage, key=self._keys.get(stage), message=told)

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, unit=units().get(stage, ""), note="")
        return self._tasks[stage]

    def _line(self, event: str, stage: str, text: str, **facts: Any) -> None:
        """Print a line where bars are not drawn."""
        if self._lines is not None:
            self._spoke = time.perf_counter()
            self._lines.tell(event, stage=stage, key=self._keys.get(stage), message=text, **facts)
        elif self._progress.disable:
            self._spoke = time.perf_counter()
            elapsed = self._spoke - self._begun
            self.console.print(f"[{elapsed:6.1f} s] {stage}: {text}")


def check_page(out: Path, knob: str) -> None:
    """Make the folder of a page. Raises ConfigError, naming the option, for one that could not be written."""
    if out.suffix != ".html":
        raise ConfigError(f"{knob} is {str(out)!r}; it takes a name that ends in .html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise PermissionError("it is a directory, or stands in one that takes no files")
    except OSError as error:
        raise ConfigError(f"{knob} {str(out)!r} cannot be written to: {error}") from error
