"""From the workers of a training run to its driver: progress, points of curves, and why it failed.

And back: workers of a step that another process took over are stopped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.errors import BitmillError, FencedOffError
from pipeline.store.records import Advance, Point
from pipeline.store.step_store import StepDir

POLL_S = 0.5
LOOK_S = 15.0  # between two looks at the lease


def send(actor: Any, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
    """Send progress from a worker to the driver; losing a message loses nothing else."""
    actor.put.remote((done, total, note), list(points))


class ProgressActor:
    """Keeps what workers send until the driver takes it."""

    def __init__(self) -> None:
        self._latest: tuple[int, int, str] | None = None
        self._points: list[Point] = []
        self._groups: set[str] = set()
        self._failure: BitmillError | None = None

    def fail(self, error: BitmillError) -> None:
        """Keep the first failure."""
        self._failure = self._failure or error

    def failure(self) -> BitmillError | None:
        """Return the first failure, or None."""
        return self._failure

    def put(self, message: tuple[int, int, str], points: list[Point]) -> None:
        """Keep a message in place of the last one, and points beside those that were not taken yet."""
        self._latest = message
        self._points += points

    def runs_in(self, group: str) -> None:
        """Keep the id of a placement group."""
        self._groups.add(group)

    def take(self) -> tuple[tuple[int, int, str] | None, list[Point], set[str]]:
        """Return the last message, the points since the one that was taken before, and the placement groups so far."""
        taken = self._latest, self._points, self._groups
        self._latest, self._points = None, []
        return taken


def remove_groups(groups: Iterable[str]) -> None:
    """Remove placement groups by their ids, and end what runs in them."""
    from ray._raylet import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for group in groups:
        with contextlib.suppress(Exception):  # it may be gone
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


@contextlib.contextmanager
def delivered(actor: Any, advance: Advance, groups: set[str], step_dir: StepDir | None = None) -> Iterator[None]:
    """Pass on what arrives in the actor while inside; what is left there goes at the end. Workers of a step that was
    taken over are ended, and the actor knows why."""
    if actor is None:
        yield
        return
    import ray

    stop = threading.Event()

    def deliver() -> None:
        last, looked = False, time.monotonic()
        while not last:
            last = stop.wait(POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):
                message, points, new_groups = ray.get(actor.take.remote(), timeout=30)
                groups.update(new_groups)
                if message is not None:
                    done, total, note = message
                    advance(done, total, note, points)
                if step_dir is not None and time.monotonic() - looked >= LOOK_S:
                    looked = time.monotonic()
                    try:
                        step_dir.notice_takeover()
                    except FencedOffError as error:
                        ray.get(actor.fail.remote(error))  # so that workers that Ray starts in their place end at once
                        remove_groups(groups)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ray.kill(actor)
