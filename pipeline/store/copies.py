"""Copies of objects on this node, which its processes share: about a budget of them, those used longest ago go first.

A path that was handed out is about to be opened, here or in another process, so what was used in the last `IN_USE_S`
seconds stays, whatever the budget. A file that is open, or mapped, outlives its name; asked for again, it is fetched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from pipeline.errors import ConfigError, writing_to

COPIES, UNFINISHED, LOCK = "copies", "unfinished", ".lock"
IN_USE_S = 600.0  # half of it where the disk is short
ABANDONED_S = 3600.0  # after its last byte, a download that is not whole has been given up
MOST_OF_DISK = 0.9  # of what copies take and what is free beside them
SLACK = 1 / 20  # of the room there is, that a process fetches before it looks again


class Copies:
    """The copies in one folder. Times of use are of this node's own clock."""

    def __init__(self, scratch: Path) -> None:
        self._folder = scratch / COPIES
        self._fetched_bytes = 0  # since room was made
        self._room_bytes = 0.0  # that there was then: at first there may be what others left

    def get(self, identity: str, fetch: Callable[[Path], object]) -> Path:
        """Return the copy of an object, used now, which `fetch` stores at a path if it is not there."""
        path = self._folder / hashlib.sha256(identity.encode()).hexdigest()
        with self._locked(fcntl.LOCK_SH), contextlib.suppress(FileNotFoundError):
            _use(path)
            return path
        temporary = self._folder / UNFINISHED / uuid.uuid4().hex
        try:
            with writing_to(temporary, "resources.local_cache_dir"):
                temporary.parent.mkdir(parents=True, exist_ok=True)
                fetch(temporary)
            self._fetched_bytes += temporary.stat().st_size
            with self._locked(fcntl.LOCK_SH):
                _use(temporary)  # it may have taken long
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def make_room(self, most_gib: float) -> None:
        """Delete the copies used longest ago until the others take at most so much, and leave some of the disk free;
        and what downloads that were killed left. Looks only where enough was fetched to matter."""
        budget = most_gib * 2**30
        if self._fetched_bytes < min(budget, self._room_bytes) * SLACK:
            return
        with self._locked(fcntl.LOCK_EX):  # else another process is handed what we are about to delete
            now, copies = time.time(), sorted(self._used())
            taken = sum(size for _, size, _ in copies)
            self._fetched_bytes, self._room_bytes = 0, MOST_OF_DISK * (taken + shutil.disk_usage(self._folder).free)
            in_use_s = IN_USE_S if budget <= self._room_bytes else IN_USE_S / 2
            for used, size, path in copies:
                if taken <= min(budget, self._room_bytes) or now - used < in_use_s:
                    break
                path.unlink(missing_ok=True)
                taken -= size
            for path in (self._folder / UNFINISHED).glob("*"):
                with contextlib.suppress(FileNotFoundError):  # it is whole now
                    if now - path.stat().st_mtime > ABANDONED_S:
                        path.unlink()

    def _used(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each copy was used last, its bytes, and its path."""
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it did not match its checksum, and is fetched again
                status = path.stat()
                if path.name not in (UNFINISHED, LOCK):
                    yield status.st_atime, status.st_size, path

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Keep other processes from deleting copies while inside, or, with an exclusive lock, from using them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, kind)
            except OSError as error:
                raise ConfigError(
                    f"The file system of the scratch folder {self._folder.parent} has no locks ({error.strerror}). Set "
                    "resources.local_cache_dir to a directory on a disk of each node."
                ) from error
            yield


def _use(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@lru_cache(maxsize=16)
def copies_in(scratch: Path) -> Copies:
    """Return the copies below a scratch folder, as this process knows them."""
    return Copies(scratch)
