"""Where steps keep their files: commit-last, with leases.

A step is done when its record exists; the record is created last, atomically and once. While a step runs, its
process holds a lease with a fencing token, and writes into a folder of that token alone:

    distill/KEY/record.json           says which file of which attempt belongs to the step
    distill/KEY/lease.json            says who runs it
    distill/KEY/3/frozen.safetensors  a file called frozen.safetensors, at this place since the third attempt
    distill/KEY/3/attempt/...         what goes when the record is there
    distill/KEY/former.json           what record.json said, once files and record were cleared away

Every write checks the token first, so what the workers of a killed driver still try to write is refused; and what one
writes that was stopped after its check, and taken over, lies in its own attempt's folder, where no record names it.
Where files were cleared away record.json holds the token of who did, in place of a record: a late one finds its place
taken, and later attempts take up nothing of those before, of which a late deletion may still be on its way.
The page on a sweep lies in its last attempt's folder, what was measured of a package beside its record. Only this
module knows how all this is spelled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, DamagedError, FencedOffError, RunError, writing_to
from pipeline.store.copies import copies_in
from pipeline.store.lease import LEASE, LeaseFile, Owner
from pipeline.store.objects import Objects, open_objects
from pipeline.store.records import ROWS, Checksum, Record, StoredFile, place_of, read_record

RECORD, FORMER = "record.json", "former.json"
CLEARED_DIGITS = 32  # of the token of who cleared a step away; a record is longer
LOOKS = 4  # for each record that is wanted
PLAN = "attempt/plan.json"
PROBES = "probes/"  # objects that tell what a store is like
R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass(frozen=True)
class StepDir:
    """The files of one step, small and picklable. `fence` is the token of the attempt that may write; None reads. Of a
    store in S3, a node keeps copies of what it reads in `scratch`, about `local_cache_gib` of them. Attempts up to the
    token `cleared` were cleared away."""

    storage_uri: str
    stage: str
    key: str
    scratch: str
    fence: int | None = None
    local_cache_gib: float = Resources().local_cache_gib
    cleared: int = 0

    @property
    def uri(self) -> str:
        """Return where the step's files lie, with a slash at the end."""
        return f"{self.storage_uri.rstrip('/')}/{self._prefix}"

    @property
    def _prefix(self) -> str:
        return f"{self.stage}/{self.key}/"

    @property
    def _scratch(self) -> Path:
        return Path(self.scratch).expanduser().resolve()

    @property
    def _objects(self) -> Objects:
        return open_objects(self.storage_uri)

    @property
    def _lease(self) -> LeaseFile:
        return LeaseFile(self._objects, self._prefix, f"{self.stage} step {self.key}")

    def record(self, kind: type[R]) -> R | None:
        """Return the step's record, or None if the step is not done."""
        data = self._stored_record()
        return read_record(data, kind, self.uri + RECORD) if data is not None else None

    def former(self, kind: type[R]) -> R | None:
        """Return what the record of a step said that was cleared away, and was to be remembered; else None."""
        data = self._stored_record(FORMER)
        return read_record(data, kind, self.uri + FORMER) if data is not None else None

    def _stored_record(self, name: str = RECORD) -> bytes | None:
        data = self._content(name)
        return None if data is None or _cleared_by(data) else data

    def _content(self, name: str) -> bytes | None:
        try:
            return self._objects.read(self._prefix + name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def commit(self, record: R, instead_of: R | None = None) -> R:
        """Create the record, or put it where `instead_of` is; whoever loses a race adopts the winner's.

        What the attempts so far kept for themselves goes, files and shards of theirs that the record names in another,
        or in none, what a later attempt has anew, and marks that Ray's file system makes for folders in S3.
        """
        stored = self._content(RECORD)  # before the fence is checked: so it is replaced only if nobody did meanwhile
        self.check_fence()
        if stored is None:
            self._objects.create(self._prefix + RECORD, record.to_json())
        elif _cleared_by(stored) or read_record(stored, type(record), self.uri + RECORD) == instead_of:
            self._objects.swap(self._prefix + RECORD, stored, record.to_json())
        winner = self.record(type(record))
        if winner is None:
            raise RunError(f"The record of the {self.stage} step {self.key} vanished while it was committed.")
        self.check_fence()  # else whoever took over meanwhile may still be reading them
        for fence in self._attempts():
            self._objects.delete_below(self._prefix + place_of("attempt/", fence))
        places, there = {name: file.place(name) for name, file in winner.stored.items()}, self.sizes()
        newest = {place.partition("/")[2]: place for place in there}
        for place in there:
            name = place.partition("/")[2]
            known = places.get(name, "" if name.startswith(ROWS) else newest.get(name, place))
            if place != known or place.endswith("/"):
                self._objects.delete(self._prefix + place)
        return winner

    def _attempts(self) -> list[int]:
        """Return the tokens of the attempts that stored something; to one that writes, those after it are nobody's, and
        those that were cleared away."""
        attempts = self._lease.attempts()
        return [token for token in attempts if self.fence is None or self.cleared < token <= self.fence]

    def place(self, name: str) -> str:
        """Return where this attempt keeps the file of a name, below the step's folder."""
        return place_of(name, self.fence)

    def read(self, place: str) -> bytes:
        """Return the content of the small file at a place. Raises FileNotFoundError."""
        return self._objects.read(self._prefix + place)

    def write(self, name: str, data: bytes) -> StoredFile:
        """Store a small file."""
        stored = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), fence=self.check_fence())
        self._objects.write(self._prefix + stored.place(name), data)
        return stored

    def upload(self, name: str, path: Path) -> StoredFile:
        """Store a local file, atomically."""
        stored = StoredFile(**checksum(path).model_dump(), fence=self.check_fence())
        self._objects.upload(self._prefix + stored.place(name), path)
        return stored

    def delete(self, place: str) -> None:
        """Delete the file at a place, if it is there."""
        self.check_fence()
        self._objects.delete(self._prefix + place)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of the files whose names start with `prefix` by their places, the oldest attempt's first."""
        listed = (self._objects.sizes(self._prefix + place_of(prefix, fence)) for fence in self._attempts())
        return {name.removeprefix(self._prefix): size for sizes in listed for name, size in sizes.items()}

    def newest(self, prefix: str = "") -> dict[str, str]:
        """Return, for each name that starts with `prefix`, the place where the newest attempt that has it keeps it."""
        return {place.partition("/")[2]: place for place in self.sizes(prefix)}

    def holds(self, name: str, stored: StoredFile) -> bool:
        """Tell whether a file is there, in its size; it is not read."""
        object_name = self._prefix + stored.place(name)
        return self._objects.sizes(object_name).get(object_name) == stored.bytes

    def local(self, name: str, stored: StoredFile) -> Path:
        """Return a local file that matches its checksum. Raises DamagedError if it is missing or does not."""
        path = self._checked(name, stored)
        self._make_room()
        return path

    def _checked(self, name: str, stored: StoredFile) -> Path:
        objects, object_name = self._objects, self._prefix + stored.place(name)
        try:
            path = objects.local(object_name, self._scratch)
            if objects.remote and not _matches(path, stored):  # the object itself may be sound
                path.unlink(missing_ok=True)
                path = objects.local(object_name, self._scratch)
        except FileNotFoundError as error:
            raise DamagedError(f"The {self.stage} step {self.key} lacks its file {name} ({self.uri}).") from error
        if _matches(path, stored):
            return path
        raise DamagedError(
            f"The file {name} of the {self.stage} step {self.key} does not match its checksum: {path}. "
            f"Delete {self.uri}{RECORD} to run the step again."
        )

    def _make_room(self) -> None:
        if self._objects.remote:
            copies_in(self._scratch).make_room(self.local_cache_gib)

    def folder(self, files: dict[str, StoredFile], prefix: str) -> Path:
        """Return a local folder of links to the files below `prefix`, each checked, and nothing else."""
        target = self._links / prefix
        target.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # while the last one was fetched, which may take long, the first may have gone
            paths = {Path(name).name: self._checked(name, files[name]) for name in files if name.startswith(prefix)}
        self._make_room()
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

    @property
    def _links(self) -> Path:
        return self.scratch_dir() / "folders" / self.stage / self.key

    def scratch_dir(self) -> Path:
        """Return a folder for temporary files on this node."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    @contextlib.contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Yield a temporary folder of its own on this node; a full disk is said as such."""
        scratch = self.scratch_dir()
        with writing_to(scratch, "resources.local_cache_dir"), tempfile.TemporaryDirectory(dir=scratch) as folder:
            yield Path(folder)

    def run_folder(self) -> tuple[str, Any]:
        """Return where Ray keeps this attempt's state: a path that all nodes share, and a pyarrow file system."""
        return self._objects.arrow(self._prefix + self.place("attempt"))

    def free_bytes(self) -> int:
        """Return the room for what the step stores; with S3, for the copies that each node keeps."""
        free = self._objects.free_bytes()
        return shutil.disk_usage(self.scratch_dir()).free if free is None else free

    def check_fence(self) -> int:
        """Return this attempt's token. Raises FencedOffError unless it still holds the step."""
        return self._lease.check(self.fence)

    def notice_takeover(self) -> None:
        """Raise FencedOffError if another attempt took the step over from this one, while it waits for work rather than
        writes. A store that is away says nothing."""
        if self.fence is not None:
            with contextlib.suppress(OSError):
                self.check_fence()

    @contextlib.contextmanager
    def hold(self, wait: bool, waiting: Callable[[Owner], None], sure: bool = False) -> Iterator[StepDir]:
        """Hold the step's lease as `LeaseFile.hold` does; yield the directory with its fencing token."""
        with self._lease.hold(wait, waiting, sure) as fence:
            yield replace(self, fence=fence, cleared=_cleared_by(self._content(RECORD) or b""))

    def last_attempt(self) -> StepDir:
        """Return the directory with the token of its last attempt, over or not; what is written with it is refused once
        there is another."""
        lease = self._lease.read()
        return replace(self, fence=lease.fence if lease is not None else None)

    def announce(self, steps: Iterable[StepDir]) -> None:
        """Say which steps the command that runs this one needs, so that none is cleared away meanwhile."""
        self.write(PLAN, json.dumps([(step.stage, step.key) for step in steps]).encode())

    def needed(self) -> list[tuple[str, str]] | None:
        """Return stage and key of the steps that were announced by who runs this one; None if nobody does, or who did
        was a process of this host that is gone."""
        lease = self._lease.read()
        if lease is None or lease.owner is None or lease.owner.gone():
            return None
        try:
            return [(stage, key) for stage, key in json.loads(self.read(place_of(PLAN, lease.fence)))]
        except FileNotFoundError:
            return []

    def clear(self, remember: bool = False) -> None:
        """Put this attempt's token in the record's place, then delete what names files, then the files: so that whoever
        dies in between leaves a step that is to be run. The lease stays, so that tokens go on counting, and what the
        record said where it is to be remembered: that of the first time, if the step was made again.

        Raises:
            FencedOffError: another attempt holds the step, or has put a record there.
        """
        stored = self._content(RECORD)  # before the fence is checked, as in `commit`
        fence = self.check_fence()
        if remember and stored is not None and not _cleared_by(stored):
            self._objects.create(self._prefix + FORMER, stored)
        name, mark = self._prefix + RECORD, b"%0*d" % (CLEARED_DIGITS, fence)
        if not (self._objects.create(name, mark) if stored is None else self._objects.swap(name, stored, mark)):
            raise FencedOffError(f"The {self.stage} step {self.key} was finished by another attempt meanwhile.")
        places = [name.removeprefix(self._prefix) for name in self._objects.sizes(self._prefix)]
        for place in sorted(places, key=lambda place: not place.endswith(".json")):
            if place not in (LEASE, FORMER, RECORD):
                self.delete(place)
        for attempt in self._lease.attempts():  # folders that are empty now, and what is hidden in them
            if attempt <= self.check_fence():
                self._objects.delete_below(self._prefix + place_of("", attempt))
        shutil.rmtree(self._links, ignore_errors=True)


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

    def uri(self, name: str) -> str:
        """Return where a file that the record lists lies, for people and registries."""
        return self.dir.uri + self.record.files[name].place(name)

    @property
    def folder_uri(self) -> str:
        """Return where the files below the record's own FOLDER lie, for people and registries."""
        folder = self.record.FOLDER
        return self.dir.uri + next(f.place(folder) for name, f in self.record.files.items() if name.startswith(folder))

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, or None if the record lists none of that name."""
        return json.loads(self.local(name).read_text(encoding="utf-8")) if name in self.record.files else None


@dataclass(frozen=True)
class StoredStep:
    """What there is of a step beside its lease and what is remembered of it: bytes, whether there is a record, and when
    it was last written to; when its lease was. Times are in seconds of the store's own clock."""

    bytes: int = 0
    done: bool = False
    written: float = -math.inf
    leased: float = -math.inf


def stored_steps(storage_uri: str, stage: str) -> dict[str, StoredStep]:
    """Return what there is of each step of a stage, by key."""
    steps: dict[str, StoredStep] = {}
    for name, stat in open_objects(storage_uri).stats(f"{stage}/").items():
        key, _, place = name.removeprefix(f"{stage}/").partition("/")
        step = steps.get(key, StoredStep())
        if place == LEASE:
            steps[key] = replace(step, leased=stat.written)
        elif place and place != FORMER and not (place == RECORD and stat.bytes == CLEARED_DIGITS):
            written = max(step.written, stat.written)
            steps[key] = replace(
                step, bytes=step.bytes + stat.bytes, done=step.done or place == RECORD, written=written
            )
    return steps


def _cleared_by(content: bytes) -> int:
    """Return the token of the attempt that cleared a step away, from what lies in its record's place; 0: a record."""
    return int(content) if len(content) == CLEARED_DIGITS and content.isdigit() else 0


def now_of(storage_uri: str) -> float:
    """Return the time by the store's own clock, in seconds. Raises OSError if nothing can be written there."""
    objects, name = open_objects(storage_uri), f"{PROBES}{uuid.uuid4().hex}"
    objects.write(name, b"")
    try:
        return objects.stats(name)[name].written
    finally:
        objects.delete(name)


def delete_probes(storage_uri: str, before: float) -> None:
    """Delete what commands that were killed had written before some time to learn of the store."""
    objects = open_objects(storage_uri)
    for name, stat in objects.stats(PROBES).items():
        if stat.written < before:
            objects.delete(name)


def records(storage_uri: str, kind: type[R], limit: int = 50) -> list[R]:
    """Return records of up to `limit` steps of one stage, for explaining what differs from what was run before. Of
    steps without one, which were stopped or still run, some are passed over."""
    objects, read = open_objects(storage_uri), list[R]()
    for key in objects.folders(f"{kind.stage}/")[: -LOOKS * limit - 1 : -1]:
        if len(read) == limit:
            break
        name = f"{kind.stage}/{key}/{RECORD}"
        with contextlib.suppress(RunError, FileNotFoundError):
            read.append(read_record(objects.read(name), kind, name))
    return read[::-1]


def check_store(storage_uri: str) -> None:
    """Raise ConfigError if nothing can be written under `storage_uri`, or two processes could both win a race there."""
    name = f"{PROBES}{uuid.uuid4().hex}"
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


def checksum(path: Path) -> Checksum:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Checksum(bytes=path.stat().st_size, sha256=digest)


def _matches(path: Path, stored: Checksum) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:  # a copy, just deleted by another process
        return False
    identity = str(path), status.st_ino, status.st_size, status.st_mtime_ns
    return status.st_size == stored.bytes and _digest_of(*identity) == stored.sha256


@lru_cache(maxsize=2**16)  # more than the shards of a store, which training reads in turn
def _digest_of(path: str, inode: int, size: int, mtime_ns: int) -> str:
    return checksum(Path(path)).sha256
