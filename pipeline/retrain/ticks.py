"""Ticks that decided nothing: unchanged, busy, or ended by a fault. They are a log beside the journal, a file a month.

A busy tick holds no lease, and one that found its store away may hold it no longer: so the log is not fenced. Whoever
adds to it swaps the file, and tries again if another was quicker. Alike ticks between two decisions are one line, so
that a schedule that ticks every few minutes for years stays readable.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.config.base import Closed
from pipeline.credentials import redacted
from pipeline.errors import BitmillError
from pipeline.retrain.decisions import Deciding, Decision, Decisions, now
from pipeline.store.objects import open_objects

LONGEST = 500  # characters of a reason
MOST = 100  # lines of a month; then faults between two decisions are one line, whatever was their reason


class Ticks(Closed):
    """Ticks with one outcome, and of faults one reason, between two decisions: how many, when the first was and when
    the last, and why that was. `after` counts the decisions before them."""

    outcome: str  # unchanged, busy or failed
    reason: str
    count: int
    at: str  # UTC, of the first
    last: str
    after: int

    def told(self) -> str:
        """Return the reason for people, with the number of ticks."""
        return f"{self.count:,} ticks, the last at {self.last}: {self.reason}" if self.count > 1 else self.reason


class Month(Closed):
    """The ticks of a month."""

    ticks: tuple[Ticks, ...] = ()

    def with_one(self, outcome: str, reason: str, at: str, after: int) -> Month:
        """Return the month with one more tick."""
        ticks = {
            (line.outcome, line.after, line.reason if line.outcome == "failed" else ""): line for line in self.ticks
        }
        alike = ticks.get((outcome, after, reason if outcome == "failed" else ""))
        if alike is None and len(ticks) >= MOST:
            alike = next((line for line in self.ticks if (line.outcome, line.after) == (outcome, after)), None)
        if alike is None:
            line = Ticks(outcome=outcome, reason=reason, count=1, at=at, last=at, after=after)
            return Month(ticks=(*self.ticks, line))
        more = alike.model_copy(update={"count": alike.count + 1, "last": at, "reason": reason})
        return Month(ticks=tuple(more if line is alike else line for line in self.ticks))


class TickLog:
    """The log of one registered name."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions
        self._objects, self._folder = open_objects(decisions.store), f"{decisions.folder}ticks/"

    def add(self, outcome: str, reason: str) -> None:
        """Write a tick down, if ever one of this name came as far as to hold it. That the store is away is no reason
        for a tick to fail, nor replaces the error of one that did."""
        with contextlib.suppress(BitmillError, OSError):
            after, at = self._decisions.count(), now()
            reason = redacted(" ".join(reason.split()))[:LONGEST]
            while after is not None and not self._added(f"{self._folder}{at[:7]}.json", outcome, reason, at, after):
                pass  # another was quicker

    def _added(self, name: str, *tick: Any) -> bool:
        try:
            before = self._objects.read(name)
        except FileNotFoundError:
            return self._objects.create(name, Month().with_one(*tick).model_dump_json().encode())
        return self._objects.swap(name, before, self._month(before).with_one(*tick).model_dump_json().encode())

    def all(self) -> list[Ticks]:
        """Return the lines, the first one first. Raises RunError for one that a newer bitmill wrote."""
        months = sorted(self._objects.sizes(self._folder))
        return [ticks for month in months for ticks in self._month(self._objects.read(month)).ticks]

    def _month(self, content: bytes) -> Month:
        return self._decisions.parsed(Month, json.loads(content))


def told_of(error: BaseException) -> str:
    """Return what an error says, and its kind where it was not foreseen."""
    return str(error) if isinstance(error, BitmillError) else f"{type(error).__name__}: {error}".rstrip(": ")


@contextlib.contextmanager
def under_way(deciding: Deciding) -> Iterator[None]:
    """Note, while inside, that a tick is under way. One that leaves no word, as it was killed or overtaken, is written
    down by the next."""
    began = deciding.decisions.notes().running
    if began:
        reason = f"it began at {began} and left no word: it was killed or overtaken, or its machine or store lost"
        TickLog(deciding.decisions).add("failed", reason)
    deciding.note(running=now())
    try:
        yield
    finally:
        with contextlib.suppress(BitmillError, OSError):  # must not replace an error under way
            deciding.note(running="")


def timeline(decisions: Sequence[Decision], ticks: Iterable[Ticks]) -> list[Decision | Ticks]:
    """Return decisions, the first one first, with the ticks after each: clocks of two machines are not compared."""
    behind: dict[int, list[Ticks]] = {}
    for line in ticks:
        behind.setdefault(line.after, []).append(line)
    lines: list[Decision | Ticks] = [*behind.get(0, ())]
    for number, decision in enumerate(decisions, 1):
        lines += (decision, *behind.get(number, ()))
    return lines
