"""The worker-hours of a tick: counted over all its attempts, and the cap that ends it.

Each attempt keeps what it used so far in an object that is named by its fencing token, so that one that was overtaken
changes nothing of another's:

    retrain/NAME/hours/KEY/3.json     {"worker_seconds": 512.3}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from time import monotonic

from pipeline.config.resources import Resources
from pipeline.errors import OverBudgetError
from pipeline.flow.plan import RunPlan
from pipeline.store.lease import Owner
from pipeline.store.locations import storage_uri
from pipeline.store.objects import open_objects
from pipeline.store.records import Point
from pipeline.tracking.listener import Listener

Tells = Callable[[RunPlan], contextlib.AbstractContextManager[Listener]]  # the listener of one run
KEEP_S = 15.0  # at most, between two times that an attempt writes down what it used: so much is lost if it is killed


class WorkerHours:
    """A clock that runs while a tick works, times the workers that work is given to. One that decides `again` what was
    decided begins from nothing: what it took before was of that decision."""

    def __init__(self, name: str, key: str, fence: int, resources: Resources, again: bool = False) -> None:
        self.cap = resources.max_worker_hours
        self._workers = max(1, resources.workers)
        self._objects, folder = open_objects(storage_uri(resources)), f"retrain/{name}/hours/{key}/"
        self._object = f"{folder}{fence}.json"
        others = [] if again else [other for other in self._objects.sizes(folder) if other != self._object]
        self._earlier_s = sum(float(json.loads(self._objects.read(other))["worker_seconds"]) for other in others)
        self._ours_s, self._kept_at = 0.0, monotonic()
        self._since: float | None = None  # None: the clock stands

    @property
    def spent_s(self) -> float:
        """Return the worker-seconds of all attempts so far."""
        running = 0.0 if self._since is None else monotonic() - self._since
        return self._earlier_s + self._ours_s + running * self._workers

    def run(self, at: str) -> None:
        """Have the clock run on, for what the tick is at. Raises OverBudgetError: as much was used as the tick may."""
        if self._since is None:
            self._since = monotonic()
        if monotonic() - self._kept_at >= KEEP_S:
            self._keep()
        if self.cap is not None and self.spent_s >= 3600 * self.cap:
            raise OverBudgetError(
                f"at {at} the tick had used {self.spent_s / 3600:.3g} worker-hours, earlier attempts included, of the "
                f"{self.cap:g} that resources.max_worker_hours allows; what was trained is kept, and the same command "
                "goes on from there once that is raised"
            )

    def stop(self) -> None:
        """Have the clock stand, and keep what was counted."""
        if self._since is not None:
            self._keep()
            self._since = None

    def _keep(self) -> None:
        self._ours_s = self.spent_s - self._earlier_s
        self._since = self._kept_at = monotonic()
        with contextlib.suppress(OSError):  # that the store is away is said by whatever needs it
            self._objects.write(self._object, json.dumps({"worker_seconds": self._ours_s}).encode())

    @contextlib.contextmanager
    def counted(self, at: str) -> Iterator[None]:
        """Count what goes on inside. Raises OverBudgetError before it begins, as `run` does."""
        try:
            self.run(at)
            yield
        finally:
            self.stop()

    def watched(self, told: Tells) -> Tells:
        """Return what gives the listener of a run that passes everything on to another, and counts the stages."""

        @contextlib.contextmanager
        def watching(plan: RunPlan) -> Iterator[Listener]:
            with told(plan) as listener:
                try:
                    yield _Counting(listener, self)
                finally:
                    self.stop()

        return watching


class _Counting:
    """Passes a run on to another listener while its stages are counted, but not what they wait for other commands. It
    ends a run that is over the cap by raising OverBudgetError, at the next sign of progress."""

    def __init__(self, listener: Listener, hours: WorkerHours) -> None:
        self._listener, self._hours = listener, hours

    def named(self, stage: str, key: str) -> None:
        self._listener.named(stage, key)

    def started(self, stage: str) -> None:
        self._hours.run(stage)
        self._listener.started(stage)

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        self._listener.advanced(stage, done, total, note)
        self._hours.run(stage)

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        self._listener.measured(stage, points)

    def finished(self, stage: str, status: str, seconds: float) -> None:
        self._hours.stop()
        self._listener.finished(stage, status, seconds)

    def waiting(self, stage: str, owner: Owner) -> None:
        self._hours.stop()
        self._listener.waiting(stage, owner)
