"""Where steps keep their files: commit-last, with leases.

A step is done when its record exists; the record is created last, atomically and once. While a step runs, its
process holds a lease with a fencing token; every write of the step checks the token first, so what the workers of
a killed driver still try to write is refused. Only this module knows how places are spelled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pyarrow.fs

from pipeline.errors import BusyError, ConfigError, DamagedError, FencedOffError, RunError
from pipeline.store.objects import FAULTS, Bucket, Directory, open_objects
from pipeline.store.records import Record, StoredFile, read_record

RECORD, LEASE = "record.json", "lease.json"
HEARTBEAT_S, DEAD_AFTER_S = 15.0, 60.0
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    host: str
    pid: int
    started_ticks: int  # since boot, so that a step of the system clock changes nothing

    @classmethod
    def this_process(cls) -> Owner:
        return cls(_this_host(), os.getpid(), _start_ticks(os.getpid()) or 0)

    def gone(self) -> bool:
        """True if the process ran on this host and runs no more."""
        if self.host != _this_host():
            return False
        return _start_ticks(self.pid) != self.started_ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}"


@dataclass(frozen=True)
class Lease:
    owner: Owner | None
    fence: int
    heartbeat: float

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes) -> Lease:
        fields = json.loads(data)
        owner = Owner(**fields["owner"]) if fields["owner"] else None
        return cls(owner, fields["fence"], fields["heartbeat"])

    def dead(self) -> bool:
        if self.owner is None or self.owner.gone():
            return True
        return self.owner.host != _this_host() and time.time() - self.heartbeat > DEAD_AFTER_S


@dataclass(frozen=True)
class Place:
    """The files of one step. Small and picklable: workers get a place, not a connection.

    `fence` is the token of the attempt that may write; None reads only.
    """

    storage_uri: str
    stage: str
    key: str
    scratch: str
    fence: int | None = None

    @property
    def uri(self) -> str:
        return f"{self.storage_uri.rstrip('/')}/{self._prefix}"

    @property
    def _prefix(self) -> str:
        return f"{self.stage}/{self.key}/"

    @property
    def _objects(self) -> Directory | Bucket:
        return open_objects(self.storage_uri)

    def record(self, kind: type[R]) -> R | None:
        """The step's record, or None if the step is not done."""
        try:
            data = self._objects.read(self._prefix + RECORD)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return read_record(data, kind, self.uri + RECORD)

    def commit(self, record: R) -> R:
        """Create the record; whoever loses a race adopts the winner's. Leftovers of the attempts go."""
        self.check_fence()
        self._objects.create(self._prefix + RECORD, record.to_json())
        winner = self.record(type(record))
        if winner is None:
            raise RunError(f"The record of the {self.stage} step {self.key} vanished while it was committed.")
        self._objects.delete_below(self._prefix + "attempt/")
        return winner

    def forget_record(self) -> None:
        """A record whose files are damaged is withdrawn, so that the step runs again."""
        self.check_fence()
        self._objects.delete(self._prefix + RECORD)

    def read(self, name: str) -> bytes:
        return self._objects.read(self._prefix + name)

    def write(self, name: str, data: bytes) -> StoredFile:
        self.check_fence()
        self._objects.write(self._prefix + name, data)
        return StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def upload(self, name: str, path: Path) -> StoredFile:
        """Store a local file; a name is written by one attempt at a time, atomically."""
        stored = checksum(path)
        self.check_fence()
        self._objects.upload(self._prefix + name, path)
        return stored

    def delete(self, name: str) -> None:
        self.check_fence()
        self._objects.delete(self._prefix + name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of the step's files whose names start with `prefix`."""
        start = len(self._prefix)
        return {name[start:]: size for name, size in self._objects.sizes(self._prefix + prefix).items()}

    def local(self, name: str, stored: StoredFile) -> Path:
        """A local file, checked against its checksum before anyone reads it.

        Raises:
            DamagedError: it is missing or does not match.
        """
        scratch = Path(self.scratch).expanduser().resolve()
        try:
            path = self._objects.local(self._prefix + name, scratch)
            if _matches(path, stored):
                return path
            if path.is_relative_to(scratch):  # a spoilt copy; the object itself may be sound
                path.unlink()
                path = self._objects.local(self._prefix + name, scratch)
                if _matches(path, stored):
                    return path
        except FileNotFoundError as error:
            raise DamagedError(f"The {self.stage} step {self.key} lacks its file {name} ({self.uri}).") from error
        raise DamagedError(
            f"The file {name} of the {self.stage} step {self.key} does not match its checksum: {path}. "
            f"Delete {self.uri}{RECORD} to run the step again."
        )

    def folder(self, files: dict[str, StoredFile], prefix: str) -> Path:
        """A local folder of links to the files below `prefix`, each checked, and nothing else."""
        target = self.scratch_dir() / "folders" / self.stage / self.key / prefix
        target.mkdir(parents=True, exist_ok=True)
        paths = {Path(name).name: self.local(name, files[name]) for name in files if name.startswith(prefix)}
        for name, path in paths.items():
            link = target / name
            if not link.is_symlink() or link.readlink() != path.resolve():
                fresh = target / f".{uuid.uuid4().hex}"
                fresh.symlink_to(path.resolve())
                fresh.replace(link)
        for other in target.iterdir():
            if other.name not in paths and not other.name.startswith("."):
                other.unlink(missing_ok=True)
        return target

    def scratch_dir(self) -> Path:
        """Room for temporary files on this node."""
        path = Path(self.scratch).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path.resolve()

    def run_folder(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Where Ray Train keeps its own state of this attempt: a path that all nodes share, and its file system."""
        if isinstance(self._objects, Bucket):
            return self._objects.arrow(self._prefix + "attempt")
        return str(self._objects.root / self._prefix / "attempt"), None

    def uri_of(self, name: str) -> str:
        """Where a file or folder of the step lies, for people and registries."""
        return self.uri + name

    def free_bytes(self) -> int:
        """Room for what the step stores; with S3, for the copies that each node keeps."""
        free = self._objects.free_bytes()
        return shutil.disk_usage(self.scratch_dir()).free if free is None else free

    def check_fence(self) -> None:
        """Raises FencedOffError unless this attempt still holds the step."""
        lease = self._lease()
        if lease is None or self.fence is None or lease.fence != self.fence:
            held = "nobody" if lease is None or lease.owner is None else str(lease.owner)
            raise FencedOffError(f"The {self.stage} step {self.key} is no longer ours: it is held by {held}.")

    def _lease(self) -> Lease | None:
        try:
            return Lease.parse(self._objects.read(self._prefix + LEASE))
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def hold(self, wait: bool, waiting: Callable[[Owner], None]) -> Iterator[Place]:
        """Hold the step's lease; yields the place with its fencing token.

        A live owner is waited for, and `waiting` is told who it is; a dead one is taken over. Whoever lets go clears
        away what killed writers left half written.

        Raises:
            BusyError: a live process holds the lease and `wait` is False.
        """
        lease = self._acquire(wait, waiting)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(lease, stop), daemon=True)
        beat.start()
        try:
            yield Place(self.storage_uri, self.stage, self.key, self.scratch, lease.fence)
        finally:
            stop.set()
            beat.join()
            current = self._lease()
            if current is not None and current.fence == lease.fence:
                with contextlib.suppress(*FAULTS):  # not every role may list uploads; tidiness must not fail a step
                    self._objects.delete_unfinished(self._prefix, spared=LEASE)
                released = Lease(None, lease.fence, time.time())
                self._objects.swap(self._prefix + LEASE, current.to_json(), released.to_json())

    def _acquire(self, wait: bool, waiting: Callable[[Owner], None]) -> Lease:
        name = self._prefix + LEASE
        told: Owner | None = None
        mine: Lease | None = None
        while True:
            current = self._lease()
            if mine is not None and current == mine:  # our write arrived, and only its answer was lost
                return mine
            mine = Lease(Owner.this_process(), 1 if current is None else current.fence + 1, time.time())
            if current is None:
                if self._objects.create(name, mine.to_json()):
                    return mine
            elif current.dead():
                if self._objects.swap(name, current.to_json(), mine.to_json()):
                    return mine
            elif not wait:
                raise BusyError(f"The {self.stage} step {self.key} is being run by {current.owner}. Try again later.")
            else:
                if current.owner is not None and current.owner != told:
                    waiting(current.owner)
                    told = current.owner
                time.sleep(1.0)

    def _beat(self, lease: Lease, stop: threading.Event) -> None:
        current = lease
        while not stop.wait(HEARTBEAT_S):
            fresh = Lease(lease.owner, lease.fence, time.time())
            try:
                if self._objects.swap(self._prefix + LEASE, current.to_json(), fresh.to_json()):
                    current = fresh
                elif (found := self._lease()) is not None and found.fence == lease.fence:
                    current = found  # our write had arrived, and only its answer was lost
                else:
                    return  # taken over; the next write finds out
            except FAULTS:
                continue  # a passing fault; the lease outlives a few missed beats


def records(storage_uri: str, kind: type[R], limit: int = 50) -> list[R]:
    """Up to `limit` records of one stage, for explaining what differs from what was run before."""
    objects = open_objects(storage_uri)
    names = [name for name in objects.sizes(f"{kind.stage}/") if name.endswith(f"/{RECORD}") and name.count("/") == 2]
    found = []
    for name in names[-limit:]:
        with contextlib.suppress(RunError, FileNotFoundError):
            found.append(read_record(objects.read(name), kind, name))
    return found


def check_writable(storage_uri: str) -> None:
    """Raises ConfigError if nothing can be written under `storage_uri`."""
    name = f"probe-{uuid.uuid4().hex}"
    try:
        objects = open_objects(storage_uri)
        objects.write(name, b"")
        objects.delete(name)
    except FAULTS as error:
        raise ConfigError(
            f"resources.storage_uri {storage_uri!r} cannot be written to: {error}. Set it to a directory you may "
            "write to, or to s3://bucket/prefix with credentials that allow it."
        ) from error


@lru_cache(maxsize=1)
def _this_host() -> str:
    """Host name, boot and process namespace: where a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    return f"{socket.gethostname()} ({boot} {os.readlink('/proc/self/ns/pid')})"


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it runs no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def checksum(path: Path) -> StoredFile:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(bytes=path.stat().st_size, sha256=digest)


def _matches(path: Path, stored: StoredFile) -> bool:
    status = path.stat()
    if status.st_size != stored.bytes:
        return False
    return _digest_of(str(path), status.st_ino, status.st_size, status.st_mtime_ns) == stored.sha256


@lru_cache(maxsize=4096)
def _digest_of(path: str, inode: int, size: int, mtime_ns: int) -> str:
    return checksum(Path(path)).sha256
