"""Ticks that decided nothing: unchanged, busy, or ended by a fault. They are a log beside the journal, a file a month.

A busy tick holds no lease, and one that found its store away may hold it no longer: so the log is not fenced. Whoever
adds to it swaps the file, and tries again if another was quicker. Alike ticks in a row are one line, so that a schedule
that ticks every few minutes for years stays readable.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator

from pipeline.config.base import Closed
from pipeline.errors import BitmillError
from pipeline.retrain.decisions import Deciding, Decision, Decisions, now
from pipeline.store.objects import open_objects

LONGEST = 500  # characters of a reason


class Ticks(Closed):
    """Ticks in a row with one outcome: how many, when the first was and when the last, and why the last was."""

    outcome: str  # unchanged, busy or failed
    reason: str
    count: int
    at: str  # UTC, of the first
    last: str
    since: str  # when the decision before them was made; empty: none was

    def told(self) -> str:
        """Return the reason for people, with the number of ticks."""
        return f"{self.count:,} ticks, the last at {self.last}: {self.reason}" if self.count > 1 else self.reason


class Month(Closed):
    """The ticks of a month."""

    ticks: tuple[Ticks, ...] = ()


class TickLog:
    """The log of one registered name."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions
        self._objects, self._folder = open_objects(decisions.store), f"{decisions.folder}ticks/"

    def add(self, outcome: str, reason: str) -> None:
        """Write a tick down, if ever one of this name came as far as to hold it. Raises OSError: the store is away."""
        if not self._decisions.begun():
            return
        last, at = self._decisions.last(), now()
        since, name = "" if last is None else last.at, f"{self._folder}{at[:7]}.json"
        added = False
        while not added:
            try:
                before = self._objects.read(name)
            except FileNotFoundError:
                before = None
            ticks = () if before is None else self._month(before).ticks
            *others, newest = ticks or (None,)
            if newest is not None and (newest.outcome, newest.since) == (outcome, since):
                line = newest.model_copy(update={"count": newest.count + 1, "last": at, "reason": reason[:LONGEST]})
            else:
                line = Ticks(outcome=outcome, reason=reason[:LONGEST], count=1, at=at, last=at, since=since)
                others = [*ticks]
            after = Month(ticks=(*others, line)).model_dump_json().encode()
            added = self._objects.create(name, after) if before is None else self._objects.swap(name, before, after)

    def all(self) -> list[Ticks]:
        """Return the lines, the first one first. Raises RunError for one that a newer bitmill wrote."""
        months = sorted(self._objects.sizes(self._folder))
        return [ticks for month in months for ticks in self._month(self._objects.read(month)).ticks]

    def _month(self, content: bytes) -> Month:
        return self._decisions.parsed(Month, json.loads(content))


@contextlib.contextmanager
def under_way(deciding: Deciding) -> Iterator[None]:
    """Note, while inside, that a tick is under way; one that was killed meanwhile is written down by the next."""
    began = deciding.decisions.notes().running
    if began:
        TickLog(deciding.decisions).add("failed", f"it began at {began}, and was killed, or its machine or store lost")
    deciding.note(running=now())
    try:
        yield
    finally:
        with contextlib.suppress(BitmillError, OSError):  # must not replace an error under way
            deciding.note(running="")


def timeline(decisions: Iterable[Decision], ticks: Iterable[Ticks]) -> list[Decision | Ticks]:
    """Return decisions and ticks by time."""
    return sorted([*decisions, *ticks], key=lambda line: line.at)
