"""From the workers of a training run to its driver: progress, points of curves, and why it failed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import BitmillError
from pipeline.store.records import Advance, Point

POLL_S = 0.5


class Sender:
    """Progress from a worker to the driver; losing a message loses nothing else."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def __call__(self, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
        self._mailbox.put.remote((done, total, note), list(points))

    def runs_in(self, group: str) -> None:
        self._mailbox.runs_in.remote(group)

    def fail(self, error: BitmillError) -> None:
        import ray

        ray.get(self._mailbox.fail.remote(error))

    def failure(self) -> BitmillError | None:
        import ray

        found: BitmillError | None = ray.get(self._mailbox.failure.remote())
        return found


class _Mailbox:
    def __init__(self) -> None:
        self._latest: tuple[int, int, str] | None = None
        self._points: list[Point] = []
        self._groups: set[str] = set()
        self._failure: BitmillError | None = None

    def fail(self, error: BitmillError) -> None:
        self._failure = self._failure or error

    def failure(self) -> BitmillError | None:
        return self._failure

    def put(self, message: tuple[int, int, str], points: list[Point]) -> None:
        self._latest = message
        self._points += points

    def runs_in(self, group: str) -> None:
        self._groups.add(group)

    def take(self) -> tuple[tuple[int, int, str] | None, list[Point], set[str]]:
        """The last message, the points since the one that was taken before, and the placement groups so far."""
        taken = self._latest, self._points, self._groups
        self._latest, self._points = None, []
        return taken


def mailbox_for_workers() -> Any:
    import ray

    return ray.remote(num_cpus=0)(_Mailbox).remote()


@contextlib.contextmanager
def delivered(mailbox: Any, advance: Advance, groups: set[str]) -> Iterator[None]:
    """While inside, pass on what arrives in the mailbox; what is left there goes at the end."""
    if mailbox is None:
        yield
        return
    import ray

    stop = threading.Event()

    def deliver() -> None:
        last = False
        while not last:
            last = stop.wait(POLL_S)
            with contextlib.suppress(ray.exceptions.RayError):
                message, points, found = ray.get(mailbox.take.remote(), timeout=30)
                groups.update(found)
                if message is not None:
                    done, total, note = message
                    advance(done, total, note, points)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ray.kill(mailbox)
