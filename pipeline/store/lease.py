"""Leases: which process runs a step, and the fencing token of its attempt, worth nothing once it was taken over.

Clocks of two machines are never compared: whoever waits watches by its own whether the owner's heart beats.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from pipeline.errors import BusyError, FencedOffError
from pipeline.store.objects import Objects
from pipeline.store.records import attempt_of

LEASE = "lease.json"
HEARTBEAT_S, DEAD_AFTER_S = 15.0, 60.0
POLL_S = 1.0
_held: set[str] = set()  # the holds of this process, by the first part of their heartbeats


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    pid: int
    started_ticks: int  # since boot, so that a jump of the system clock changes nothing

    @classmethod
    def this_process(cls) -> Owner:
        """Return the calling process."""
        return cls(_this_host(), os.getpid(), _start_ticks(os.getpid()) or 0)

    def gone(self) -> bool:
        """Tell whether the process ran on this host and runs no more."""
        return self.host == _this_host() and _start_ticks(self.pid) != self.started_ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}"


@dataclass(frozen=True)
class Lease:
    """The content of a lease's file; without an owner it was let go. Each heartbeat is another value, of no clock; what
    is before its dash stays while the lease is held."""

    owner: Owner | None
    fence: int
    heartbeat: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> bytes:
        """Return the bytes of the file."""
        return json.dumps(asdict(self)).encode()

    @property
    def hold(self) -> str:
        """Return what names the hold among all there are."""
        return self.heartbeat.partition("-")[0]

    def beaten(self) -> Lease:
        """Return the lease after another beat of the heart."""
        return replace(self, heartbeat=f"{self.hold}-{uuid.uuid4().hex}")

    def given_up(self) -> bool:
        """Tell whether this very process took or held the lease and could not say that it does no more."""
        return self.owner == Owner.this_process() and self.hold not in _held

    @classmethod
    def parse(cls, data: bytes) -> Lease:
        """Return the lease that `to_json` wrote."""
        fields = json.loads(data)
        return cls(Owner(**fields["owner"]) if fields["owner"] else None, fields["fence"], fields["heartbeat"])


class Watch:
    """Watches a lease by this process's own clock, from the first look on."""

    def __init__(self) -> None:
        self._seen: Lease | None = None
        self._since = 0.0
        self._beats = False

    def dead(self, lease: Lease) -> bool:
        """Tell whether nobody holds the lease any more. An owner on this host is asked, this process remembers; one
        elsewhere is dead once its heart has not beaten for `DEAD_AFTER_S` seconds before our eyes."""
        now = time.monotonic()
        if lease != self._seen:
            self._beats = self._seen is not None
            self._seen, self._since = lease, now
        if lease.owner is None or lease.owner.host == _this_host():
            return lease.owner is None or lease.owner.gone() or lease.given_up()
        return now - self._since >= DEAD_AFTER_S

    def doubtful(self, lease: Lease) -> bool:
        """Tell whether a lease that is not dead may yet be: its owner is elsewhere, and its heart has not beaten so
        far."""
        return not self._beats and lease.owner is not None and lease.owner.host != _this_host()


@dataclass(frozen=True)
class LeaseFile:
    """The lease of one folder of a store. `title` names what is leased in messages, such as "distill step 1f0c"."""

    objects: Objects
    folder: str  # ends in a slash
    title: str

    @property
    def _name(self) -> str:
        return self.folder + LEASE

    def read(self) -> Lease | None:
        """Return the lease as it is now, or None if there never was one."""
        try:
            return Lease.parse(self.objects.read(self._name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def attempts(self) -> list[int]:
        """Return, in order, the tokens of the attempts that stored something."""
        return sorted(filter(None, map(attempt_of, self.objects.folders(self.folder))))

    def check(self, fence: int | None) -> int:
        """Return the token of an attempt. Raises FencedOffError unless it still holds the lease."""
        lease = self.read()
        if lease is None or fence is None or lease.fence != fence:
            holder = "nobody" if lease is None or lease.owner is None else str(lease.owner)
            raise FencedOffError(f"The {self.title} is no longer ours: it is held by {holder}.")
        return fence

    @contextlib.contextmanager
    def hold(
        self, wait: bool, waiting: Callable[[Owner], None], sure: bool = False, seize: bool = False
    ) -> Iterator[int]:
        """Hold the lease while inside; yield the fencing token.

        A live owner is waited for, and `waiting` is told who it is; a dead one is taken over, and with `seize` any: it
        is refused its next write. Whoever lets go clears away what killed writers of this attempt and those before left
        half written in their folders.

        Raises:
            BusyError: a process holds the lease, and `wait` is False: there is no time to see whether it lives; with
                `sure` there is: a heart that beats, or a process on this host.
        """
        lease = self._acquire(wait, waiting, sure, seize)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(lease, stop), daemon=True)
        beat.start()
        hidden: tuple[type[OSError], ...] = (OSError,)
        try:
            yield lease.fence
            hidden = ()
        finally:
            try:
                with contextlib.suppress(OSError):  # not every role may list uploads; tidiness must not fail a step
                    self.objects.delete_unfinished(self.folder, lambda place: 0 < attempt_of(place) <= lease.fence)
            finally:  # the heart beats until here, for that may take long
                stop.set()
                beat.join()
                _held.discard(lease.hold)  # also where the store is away: then the next one here takes it over
                with contextlib.suppress(*hidden):  # that the store is away must not replace an error under way
                    self._release(lease)

    def _release(self, lease: Lease) -> None:
        current = self.read()
        if current is not None and current.fence == lease.fence:
            self.objects.swap(self._name, current.to_json(), Lease(None, lease.fence).to_json())

    def _acquire(self, wait: bool, waiting: Callable[[Owner], None], sure: bool, seize: bool) -> Lease:
        told: Owner | None = None
        watch = Watch()
        while True:
            current = self.read()
            if current is None:
                newest = max(self.attempts(), default=0)  # its file may be lost
                if (mine := self._put(None, newest + 1)) is not None:
                    return mine
            elif seize or watch.dead(current):
                if (mine := self._put(current, current.fence + 1)) is not None:
                    return mine
            elif not wait and not (sure and watch.doubtful(current)):
                raise BusyError(
                    f"The {self.title} is being run by {current.owner}. Try again later, or leave out --no-wait: who "
                    f"waits takes over once the process is gone or, on another machine, silent for {DEAD_AFTER_S:g} s."
                )
            else:
                if wait and current.owner is not None and current.owner != told:
                    waiting(current.owner)
                    told = current.owner
                time.sleep(POLL_S)

    def _put(self, current: Lease | None, fence: int) -> Lease | None:
        """Put a lease of this process where `current` is; return it, or None if another was quicker."""
        mine, won = Lease(Owner.this_process(), fence), False
        _held.add(mine.hold)  # before other threads see it
        try:
            if current is None:
                won = self.objects.create(self._name, mine.to_json())
            else:
                won = self.objects.swap(self._name, current.to_json(), mine.to_json())
        finally:
            if not won:
                _held.discard(mine.hold)
        return mine if won else None

    def _beat(self, lease: Lease, stop: threading.Event) -> None:
        current = lease
        while not stop.wait(HEARTBEAT_S):
            fresh = current.beaten()
            try:
                if self.objects.swap(self._name, current.to_json(), fresh.to_json()):
                    current = fresh
                elif (stored := self.read()) is not None and stored.fence == lease.fence:
                    current = stored  # our write had arrived, and only its answer was lost
                else:
                    return  # taken over; the next write finds out
            except OSError:
                continue  # a passing fault; the lease outlives a few missed beats


@lru_cache(maxsize=1)
def _this_host() -> str:
    """Name host, boot and process namespace: where a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    return f"{socket.gethostname()} ({boot} {os.readlink('/proc/self/ns/pid')})"


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it runs no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
