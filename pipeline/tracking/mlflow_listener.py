"""The curves of a run, with steps, and the load of this machine, sent to MLflow while the run goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from pipeline.store.records import Point
from pipeline.tracking import runs
from pipeline.tracking.listener import Listener
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Target, prefixed

LOAD_EVERY_S = 10.0


class MlflowListener:
    """A listener of the flow that passes everything on, and sends the curves of a run to MLflow."""

    def __init__(self, listener: Listener, outbox: Outbox, target: Target) -> None:
        self._listener, self._outbox, self._target = listener, outbox, target
        self.named, self.waiting = listener.named, listener.waiting
        self.advanced, self.finished = listener.advanced, listener.finished

    def started(self, stage: str) -> None:
        if stage == "register":  # which completes the curves, so that nothing may come after it
            self._outbox.flush()
        self._listener.started(stage)

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        self._outbox.put(self._target, prefixed(stage, points))
        self._listener.measured(stage, points)


@contextlib.contextmanager
def load_watched(outbox: Outbox, target: Target) -> Iterator[None]:
    """Send the load of this machine to the run while inside."""
    stop = threading.Event()

    def watch() -> None:
        sample = runs.system_load()
        while not stop.wait(LOAD_EVERY_S):
            outbox.put(target, [{f"system/{name}": value for name, value in sample().items()}])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
