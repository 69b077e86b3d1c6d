"""Where steps keep their files: commit-last, with leases.

A step is done when its record exists; the record is created last, atomically and once. While a step runs, its
process holds a lease with a fencing token; every write of the step checks the token first, so what the workers of
a killed driver still try to write is refused. Only this module knows how the directories of steps are spelled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.errors import ConfigError, DamagedError, RunError
from pipeline.store.lease import LeaseFile, Owner
from pipeline.store.objects import Objects, open_objects
from pipeline.store.records import Record, StoredFile, read_record

RECORD = "record.json"
R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass(frozen=True)
class StepDir:
    """The files of one step, small and picklable. `fence` is the token of the attempt that may write; None reads."""

    storage_uri: str
    stage: str
    key: str
    scratch: str
    fence: int | None = None

    @property
    def uri(self) -> str:
        """Return where the step's files lie, with a slash at the end."""
        return f"{self.storage_uri.rstrip('/')}/{self._prefix}"

    @property
    def _prefix(self) -> str:
        return f"{self.stage}/{self.key}/"

    @property
    def _objects(self) -> Objects:
        return open_objects(self.storage_uri)

    @property
    def _lease(self) -> LeaseFile:
        return LeaseFile(self._objects, self._prefix, f"{self.stage} step {self.key}")

    def record(self, kind: type[R]) -> R | None:
        """Return the step's record, or None if the step is not done."""
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
        """Withdraw a record whose files are damaged, so that the step runs again."""
        self.check_fence()
        self._objects.delete(self._prefix + RECORD)

    def read(self, name: str) -> bytes:
        """Return a small file's content. Raises FileNotFoundError."""
        return self._objects.read(self._prefix + name)

    def write(self, name: str, data: bytes) -> StoredFile:
        """Store a small file."""
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
        """Delete a file, if it is there."""
        self.check_fence()
        self._objects.delete(self._prefix + name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of the step's files whose names start with `prefix`."""
        sizes = self._objects.sizes(self._prefix + prefix)
        return {name.removeprefix(self._prefix): size for name, size in sizes.items()}

    def local(self, name: str, stored: StoredFile) -> Path:
        """Return a local file that matches its checksum. Raises DamagedError if it is missing or does not."""
        scratch = Path(self.scratch).expanduser().resolve()
        try:
            path = self._objects.local(self._prefix + name, scratch)
            if path.is_relative_to(scratch) and not _matches(path, stored):  # the object itself may be sound
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
        """Return a local folder of links to the files below `prefix`, each checked, and nothing else."""
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
        """Return a folder for temporary files on this node."""
        path = Path(self.scratch).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path.resolve()

    def run_folder(self) -> tuple[str, Any]:
        """Return where Ray keeps this attempt's state: a path that all nodes share, and a pyarrow file system."""
        return self._objects.arrow(self._prefix + "attempt")

    def uri_of(self, name: str) -> str:
        """Return where a file or folder of the step lies, for people and registries."""
        return self.uri + name

    def free_bytes(self) -> int:
        """Return the room for what the step stores; with S3, for the copies that each node keeps."""
        free = self._objects.free_bytes()
        return shutil.disk_usage(self.scratch_dir()).free if free is None else free

    def check_fence(self) -> None:
        """Raise FencedOffError unless this attempt still holds the step."""
        self._lease.check(self.fence)

    @contextlib.contextmanager
    def hold(self, wait: bool, waiting: Callable[[Owner], None]) -> Iterator[StepDir]:
        """Hold the step's lease as `LeaseFile.hold` does; yield the directory with its fencing token."""
        with self._lease.hold(wait, waiting) as fence:
            yield StepDir(self.storage_uri, self.stage, self.key, self.scratch, fence)


@dataclass(frozen=True)
class FinishedStep(Generic[R_co]):
    """A finished step as it is handed on: its record, and its files on whatever node asks."""

    record: R_co
    dir: StepDir

    def local(self, name: str) -> Path:
        """Return a local, checked copy of a file that the record lists."""
        return self.dir.local(name, self.record.files[name])

    def folder(self) -> Path:
        """Return a local folder with the files below the record's own FOLDER."""
        return self.dir.folder(self.record.files, self.record.FOLDER)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, or None if the record lists none of that name."""
        return json.loads(self.local(name).read_text(encoding="utf-8")) if name in self.record.files else None


def records(storage_uri: str, kind: type[R], limit: int = 50) -> list[R]:
    """Return up to `limit` records of one stage, for explaining what differs from what was run before."""
    objects = open_objects(storage_uri)
    names = [name for name in objects.sizes(f"{kind.stage}/") if name.endswith(f"/{RECORD}") and name.count("/") == 2]
    read = []
    for name in names[-limit:]:
        with contextlib.suppress(RunError, FileNotFoundError):
            read.append(read_record(objects.read(name), kind, name))
    return read


def check_store(storage_uri: str) -> None:
    """Raise ConfigError if nothing can be written under `storage_uri`, or two processes could both win a race there."""
    name = f"probe-{uuid.uuid4().hex}"
    try:
        objects = open_objects(storage_uri)
        try:
            flaw = objects.flaw(name)
        finally:
            objects.delete(name)
    except OSError as error:
        raise ConfigError(
            f"resources.storage_uri {storage_uri!r} cannot be written to: {error}. Set it to a directory you may "
            "write to, or to s3://bucket/prefix with credentials that allow it."
        ) from error
    if flaw is not None:
        raise ConfigError(
            f"resources.storage_uri {storage_uri!r} cannot keep two commands from running one step: {flaw}. Set it to "
            "a directory on a file system with hard links and locks, or to a bucket of a store that honours If-Match "
            "and If-None-Match when it is written to, as AWS S3 does."
        )


def checksum(path: Path) -> StoredFile:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(bytes=path.stat().st_size, sha256=digest)


def _matches(path: Path, stored: StoredFile) -> bool:
    status = path.stat()
    identity = str(path), status.st_ino, status.st_size, status.st_mtime_ns
    return status.st_size == stored.bytes and _digest_of(*identity) == stored.sha256


@lru_cache(maxsize=4096)
def _digest_of(path: str, inode: int, size: int, mtime_ns: int) -> str:
    return checksum(Path(path)).sha256
