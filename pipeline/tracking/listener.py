"""Listeners, which are told how a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.store.lease import Owner
from pipeline.store.records import Point


class Listener(Protocol):
    """A listener is told how the run goes."""

    def named(self, stage: str, key: str) -> None:
        """Hear the key of a stage's step, before anything else of it."""

    def started(self, stage: str) -> None:
        """Hear that a stage begins."""

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        """Hear that a stage goes on: done of how many, and a word on how it goes."""

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        """Hear of points of a stage's curves."""

    def finished(self, stage: str, status: str, seconds: float) -> None:
        """Hear that a stage ends."""

    def waiting(self, stage: str, owner: Owner) -> None:
        """Hear that another process runs the step."""


class SilentListener:
    """A listener that says nothing."""

    def named(self, stage: str, key: str) -> None: ...
    def started(self, stage: str) -> None: ...
    def advanced(self, stage: str, done: int, total: int, note: str) -> None: ...
    def measured(self, stage: str, points: Sequence[Point]) -> None: ...
    def finished(self, stage: str, status: str, seconds: float) -> None: ...
    def waiting(self, stage: str, owner: Owner) -> None: ...


def tell(listener: Listener, stage: str, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
    """Pass on what a stage says as `Advance`."""
    listener.advanced(stage, done, total, note)
    if points:
        listener.measured(stage, points)
