"""Named objects behind one small interface: files below a directory, or a bucket in S3 (`s3`)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.credentials import taking_none
from pipeline.errors import ConfigError, RunError, writing_to

TEMPORARY = ".tmp"
KNOB = "resources.storage_uri"


class Stat(NamedTuple):
    """The bytes of an object, and when it was written last, in seconds of the store's own clock."""

    bytes: int
    written: float


class Objects(Protocol):
    """Named objects, each write atomic: a reader sees the old, the new, or none. OSError if it cannot be reached; then
    nobody knows whether what was to be written is."""

    remote: bool  # so that `local` makes copies

    def read(self, name: str) -> bytes:
        """Return an object's content. Raises FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Store an object, in place of one that exists."""

    def create(self, name: str, data: bytes) -> bool:
        """Write unless the object exists; False if it does."""

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        """Replace the object if it still holds `expected`; False otherwise."""

    def upload(self, name: str, path: Path) -> None:
        """Store a local file as an object, in place of one that exists."""

    def local(self, name: str, scratch: Path) -> Path:
        """Return a local file with the object's content: the object itself, or a copy under `scratch`."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of every object whose name starts with `prefix`."""

    def stats(self, prefix: str) -> dict[str, Stat]:
        """Return bytes and time of every object whose name starts with `prefix`."""

    def folders(self, prefix: str) -> list[str]:
        """Return the names of what lies directly below `prefix`, which ends in a slash, and has objects below itself;
        one listing, however many those are."""

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""

    def delete_below(self, prefix: str) -> None:
        """Delete every object whose name starts with `prefix`, which ends in a slash."""

    def delete_unfinished(self, prefix: str, given_up: Callable[[str], bool]) -> None:
        """Delete what killed writers left below `prefix`, which ends in a slash, where `given_up` says so of the rest
        of its name."""

    def free_bytes(self) -> int | None:
        """Return the space left, or None where there is no limit to ask for."""

    def arrow(self, name: str) -> tuple[str, Any]:
        """Return the place of an object for readers through Arrow: a path, and its file system, None for ours."""

    def flaw(self, name: str) -> str | None:
        """Return why `create` and `swap` cannot be relied on, tried on an object of this new name; None if they can."""


class Directory:
    """Objects as files below a directory, on this machine or a shared file system."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise RunError(f"The object name {name!r} leads outside the store {self.root}.")
        return path

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda temporary: temporary.write_bytes(data), os.replace)

    def create(self, name: str, data: bytes) -> bool:
        return self._put(name, lambda temporary: temporary.write_bytes(data), os.link)

    def swap(self, name: str, expected: bytes, data: bytes) -> bool:
        path = self._path(name)
        if not path.exists():
            return False
        with writing_to(path, KNOB), open(_lock_of(path), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if path.read_bytes() != expected:
                    return False
            except FileNotFoundError:
                return False
            self.write(name, data)
            return True

    def upload(self, name: str, path: Path) -> None:
        self._put(name, lambda temporary: shutil.copyfile(path, temporary), os.replace)

    def local(self, name: str, scratch: Path) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def sizes(self, prefix: str) -> dict[str, int]:
        return {name: stat.bytes for name, stat in self.stats(prefix).items()}

    def stats(self, prefix: str) -> dict[str, Stat]:
        folder = self._path(prefix.rpartition("/")[0])
        stats = {}
        for parent, _, files in os.walk(folder):  # unlike rglob, at ease with folders that vanish meanwhile
            for path in (Path(parent, file) for file in files if not file.startswith(".")):
                name = path.relative_to(self.root.resolve()).as_posix()
                if name.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        stats[name] = Stat(status.st_size, status.st_mtime)
        return dict(sorted(stats.items()))

    def folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._path(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def delete_unfinished(self, prefix: str, given_up: Callable[[str], bool]) -> None:
        root = self._path(prefix)
        for folder, _, names in os.walk(root):
            for path in (Path(folder, name) for name in names if name.endswith(TEMPORARY)):
                if given_up(path.relative_to(root).as_posix()):
                    path.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        root = self.root.resolve()
        return shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free

    def arrow(self, name: str) -> tuple[str, None]:
        return str(self.root / name), None

    def flaw(self, name: str) -> str | None:
        self.write(name, b"")
        self.delete(name)
        try:
            if not self.create(name, b"first") or self.create(name, b"second"):
                return "a hard link takes the place of a file that is there"
        except OSError as error:
            return f"it has no hard links ({error.strerror})"
        lock = _lock_of(self._path(name))
        try:
            with open(lock, "w") as first, open(lock, "w") as second:
                fcntl.flock(first, fcntl.LOCK_EX)
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "its locks hold nobody off"
        except BlockingIOError:
            return None
        except OSError as error:
            return f"it has no locks ({error.strerror})"
        finally:
            lock.unlink()

    def _put(self, name: str, fill: Callable[[Path], object], place: Callable[[Path, Path], None]) -> bool:
        """Fill a temporary file and put it in the object's place, whole; False if `place` refuses an object there."""
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            with writing_to(path, KNOB):
                path.parent.mkdir(parents=True, exist_ok=True)
                fill(temporary)
                _sync(temporary)
                try:
                    place(temporary, path)
                except FileExistsError:  # it is ours where only the answer of a file server was lost
                    return path.exists() and path.samefile(temporary)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@lru_cache(maxsize=16)
def open_objects(uri: str) -> Objects:
    """Return the objects under a directory path, `file://` or `s3://bucket/prefix`. Raises ConfigError for others, and
    for a user or password in it."""
    try:
        taking_none(uri)
    except ValueError as error:
        raise ConfigError(f"The URI of a store or model cannot be used: {error}.") from error
    if uri.startswith("s3://"):
        from pipeline.store.s3 import Bucket  # boto3 takes as long to import as a local plan takes in all

        bucket, *folders = uri[5:].rstrip("/").split("/")
        if not {"", ".", ".."}.isdisjoint([bucket, *folders]):  # which whatever lies between here and S3 may resolve
            raise ConfigError(
                f"resources.storage_uri is {uri!r}; valid: s3://bucket/prefix, without empty or dotted parts"
            )
        return Bucket(bucket, "".join(f"{folder}/" for folder in folders))
    if "://" in uri and not uri.startswith("file://"):
        raise ConfigError(f"resources.storage_uri is {uri!r}; valid: a directory, or s3://bucket/prefix")
    return Directory(Path(uri.removeprefix("file://")).expanduser().resolve())


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
