"""From the workers of a training run to its driver: progress, points of curves, and why it failed.

And back: workers of a step that another process took over are stopped, and those that who listens has enough of.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.errors import BitmillError
from pipeline.store.records import Advance, Point
from pipeline.store.step_store import StepDir

POLL_S = 0.5
REPLY_S = 30.0
LOOK_S = 15.0  # between two looks at the lease


def send(actor: Any, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
    """Send progress from a worker to the driver; losing a message loses nothing else."""
    actor.put.remote((done, total, note), list(points))


def asked(reply: Any) -> Any:
    """Return what an actor replies, or None if it does not: it may be on a node that died."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(reply, timeout=REPLY_S)
    return None


class Lookout:
    """Looks at a step's lease now and then, on behalf of what goes on for long without a write."""

    def __init__(self, step_dir: StepDir | None) -> None:
        self._step_dir, self._looked = step_dir, time.monotonic()

    def look(self) -> None:
        """Raise FencedOffError if the step was taken over; looks every `LOOK_S` seconds, however often it is called."""
        if self._step_dir is not None and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._step_dir.notice_takeover()


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


def beside_driver() -> Any:
    """Start the actor on the node of this process, with which alone it is lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote()


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
    taken over, or that whoever is told of it ends by an error, are ended, and the actor knows why."""
    if actor is None:
        yield
        return
    import ray

    stop = threading.Event()

    def deliver() -> None:
        last, lookout = False, Lookout(step_dir)
        while not last:
            last = stop.wait(POLL_S)
            message, points, new_groups = asked(actor.take.remote()) or (None, [], set())
            groups.update(new_groups)
            try:
                if message is not None:
                    done, total, note = message
                    advance(done, total, note, points)
                lookout.look()
            except BitmillError as error:
                asked(actor.fail.remote(error))  # so that workers that Ray starts in their place end at once
                remove_groups(groups)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ray.kill(actor)
