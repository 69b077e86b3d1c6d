"""Copies of objects on this node, which its processes share: within a budget, those used longest ago go first.

A path that was handed out is about to be opened, here or in another process, so what was used in the last `IN_USE_S`
seconds stays, whatever the budget. A file that is open, or mapped, outlives its name; asked for again, it is fetched.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

COPIES, UNFINISHED = "copies", "unfinished"  # folders
IN_USE_S = 600.0
ABANDONED_S = 3600.0  # after its last byte, a download that is not whole has been given up
MOST_OF_DISK = 0.9  # of what copies take and what is free beside them
SLACK = 1 / 20  # of the budget that a process fetches before it looks again


class Copies:
    """The copies in one folder. Times of use are of this node's own clock."""

    def __init__(self, scratch: Path) -> None:
        self._folder = scratch / COPIES
        self._fetched_bytes = math.inf  # since room was made: at first there may be what others left

    def get(self, identity: str, fetch: Callable[[Path], object]) -> Path:
        """Return the copy of an object, which `fetch` stores at a path if it is not there."""
        path = self._folder / hashlib.sha256(identity.encode()).hexdigest()
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            temporary = self._folder / UNFINISHED / uuid.uuid4().hex
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(temporary)
                self._fetched_bytes += temporary.stat().st_size
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def make_room(self, most_gib: float) -> None:
        """Delete the copies used longest ago until the others take at most so much, and leave some of the disk free;
        and what downloads that were killed left. Looks only where enough was fetched to matter."""
        budget = most_gib * 2**30
        if self._fetched_bytes < budget * SLACK:
            return
        self._fetched_bytes = 0.0
        now, copies = time.time(), sorted(self._used())
        taken = sum(size for _, size, _ in copies)
        room = min(budget, MOST_OF_DISK * (taken + shutil.disk_usage(self._folder).free))
        for used, size, path in copies:
            if taken <= room or now - used < IN_USE_S:
                break
            path.unlink(missing_ok=True)
            taken -= size
        for path in (self._folder / UNFINISHED).iterdir():
            if now - path.stat().st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)

    def _used(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each copy was used last, its bytes, and its path."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.is_file():
                    status = entry.stat()
                    yield status.st_atime, status.st_size, Path(entry.path)


@lru_cache(maxsize=16)
def copies_in(scratch: Path) -> Copies:
    """Return the copies below a scratch folder, as this process knows them."""
    return Copies(scratch)
