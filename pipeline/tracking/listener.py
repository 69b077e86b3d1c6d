"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.store.lease import Owner
from pipeline.store.records import Point


class Observer(Protocol):
    """Who is told how the run goes."""

    def started(self, stage: str) -> None: ...
    def advanced(self, stage: str, done: int, total: int, note: str) -> None: ...
    def measured(self, stage: str, points: Sequence[Point]) -> None: ...
    def finished(self, stage: str, status: str, seconds: float) -> None: ...
    def waiting(self, stage: str, owner: Owner) -> None: ...


class Silent:
    """An observer that says nothing."""

    def started(self, stage: str) -> None:
        """A stage begins."""

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        """A stage goes on."""

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        """Points of its curves."""

    def finished(self, stage: str, status: str, seconds: float) -> None:
        """A stage ends."""

    def waiting(self, stage: str, owner: Owner) -> None:
        """Another process runs the step."""


def tell(observer: Observer, stage: str, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
    """Pass on what a stage says as `Advance`."""
    observer.advanced(stage, done, total, note)
    if points:
        observer.measured(stage, points)
