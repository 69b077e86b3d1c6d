"""What a person sees on stderr: a progress bar for each stage on a terminal, a line at each quarter elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.store.lease import Owner
from pipeline.store.records import Point

UNITS = {"tokenize": "parts", "finetune": "steps", "cache": "shards", "distill": "steps", "evaluate": "parts"}


class Display:
    """An observer of the flow; use it as a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, int] = {}
        self._begun = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def started(self, stage: str) -> None:
        if self._live:
            self._task(stage)
        else:
            self._line(stage, "started")

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        if self._live:
            self._progress.update(self._task(stage), completed=done, total=total, note=note)
            return
        quarter = 4 * done // max(1, total)
        if quarter > self._printed.get(stage, 0):
            self._printed[stage] = quarter
            self._line(stage, f"{done}/{total} {UNITS.get(stage, '')}{', ' + note if note else ''}")

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        """Curves are for MLflow; the note of `advanced` says the last loss."""

    def finished(self, stage: str, status: str, seconds: float) -> None:
        text = "reused" if status == "reused" else f"done in {seconds:.1f} s"
        if not self._live:
            self._line(stage, text)
            return
        task = self._task(stage)
        total = self._progress.tasks[task].total or 1
        self._progress.update(task, completed=total, total=total, note=text)
        self._progress.stop_task(task)

    def waiting(self, stage: str, owner: Owner) -> None:
        self.console.print(f"{stage}: waiting for {owner}, which runs this very step", highlight=False)

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, unit=UNITS.get(stage, ""), note="")
        return self._tasks[stage]

    def _line(self, stage: str, text: str) -> None:
        elapsed = time.perf_counter() - self._begun
        self.console.print(f"[{elapsed:6.1f} s] {stage}: {text}", highlight=False, markup=False)
