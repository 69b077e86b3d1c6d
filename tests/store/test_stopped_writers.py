"""A writer that stops between its look at the lease and its write, and goes on when another attempt has taken over."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BitmillError, FencedOffError, RunError
from pipeline.store import objects as objects_module
from pipeline.store.lease import Lease, Owner
from pipeline.store.objects import Directory, open_objects
from pipeline.store.records import Evaluation, StoredFile
from pipeline.store.step_store import FinishedStep, StepDir
from tests.store.test_step_store import EVERYWHERE, KEY, evaluation, serve_s3

IN_PARTS = 9 * 2**20  # bytes, from which S3 is given a file in parts
S3_CALLS = ("put_object", "complete_multipart_upload")
Write = Callable[[StepDir, bytes], StoredFile]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=EVERYWHERE)
def dead(request: pytest.FixtureRequest, tmp_path: Path) -> StepDir:
    """A step as the first attempt's workers hold it, whose driver is gone: their looks at the lease find nothing."""
    uri = str(tmp_path / "store") if request.param == "directory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    gone = replace(Owner.this_process(), started_ticks=0)
    open_objects(uri).write(f"{Evaluation.stage}/{KEY}/lease.json", Lease(gone, 1).to_json())
    return StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch"), fence=1)


class Stopped:
    """The next write to the store stops at its last step, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_dir: StepDir) -> None:
        self._monkeypatch, self._armed = monkeypatch, threading.Event()
        self._there, self._go, self._pool = threading.Event(), threading.Event(), ThreadPoolExecutor(1)
        objects: Any = open_objects(step_dir.storage_uri)
        if isinstance(objects, Directory):
            self._stop_before(objects_module, "_sync")  # all is written, and nothing is in its place
        else:
            for call in S3_CALLS:
                self._stop_before(objects.client, call)

    def _stop_before(self, where: Any, call: str) -> None:
        sound = getattr(where, call)

        def stopping(*arguments: Any, **keywords: Any) -> Any:
            if self._armed.is_set():
                self._armed.clear()
                self._there.set()
                assert self._go.wait(60)
            return sound(*arguments, **keywords)

        self._monkeypatch.setattr(where, call, stopping)

    def start(self, write: Callable[[], Any]) -> Future[Any]:
        """Begin a write elsewhere; it is about to end when this returns."""
        self._armed.set()
        late = self._pool.submit(write)
        assert self._there.wait(60)
        return late

    def go(self, late: Future[Any]) -> None:
        """Let the write end, however it does."""
        self._go.set()
        with contextlib.suppress(BitmillError, OSError):
            late.result(60)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, dead: StepDir) -> Stopped:
    return Stopped(monkeypatch, dead)


def uploaded(step_dir: StepDir, data: bytes) -> StoredFile:
    path = step_dir.scratch_dir() / uuid.uuid4().hex
    path.write_bytes(data)
    return step_dir.upload("weights", path)


def written(step_dir: StepDir, data: bytes) -> StoredFile:
    return step_dir.write("weights", data)


def weights(record: Evaluation, step_dir: StepDir, tmp_path: Path) -> bytes:
    """What a node that never saw the step reads of the record's file."""
    elsewhere = replace(step_dir, fence=None, scratch=str(tmp_path / uuid.uuid4().hex))
    return FinishedStep(record, elsewhere).local("weights").read_bytes()


@pytest.mark.parametrize(
    ("write", "size", "while_the_other_runs"),
    [  # parts that whoever took over has cleared away make this S3 fail slowly
        (uploaded, IN_PARTS, True),
        (uploaded, 9, True),
        (uploaded, 9, False),
        (written, 9, True),
        (written, 9, False),
    ],
)
def test_a_late_write_harms_no_file_of_the_record(
    dead: StepDir, stopped: Stopped, tmp_path: Path, write: Write, size: int, while_the_other_runs: bool
) -> None:
    late = stopped.start(lambda: write(dead, b"L" * size))
    with replace(dead, fence=None).hold(False, print) as taken:
        record = taken.commit(evaluation("ours", weights=write(taken, b"o" * size)))
        if while_the_other_runs:
            stopped.go(late)
    stopped.go(late)
    assert taken.record(Evaluation) == record == evaluation("ours", weights=record.files["weights"])
    assert weights(record, taken, tmp_path) == b"o" * size


def test_a_late_record_is_not_put_in_place_of_another(dead: StepDir, stopped: Stopped, tmp_path: Path) -> None:
    theirs = evaluation("late", weights=written(dead, b"late"))
    late = stopped.start(lambda: dead.commit(theirs))
    with replace(dead, fence=None).hold(False, print) as taken:
        record = taken.commit(evaluation("ours", weights=written(taken, b"ours")))
        stopped.go(late)
        assert taken.record(Evaluation) == record
    assert (record.digest, weights(record, taken, tmp_path)) == ("ours", b"ours")


def test_a_record_that_comes_after_its_files_were_cleared_away_is_none(dead: StepDir, stopped: Stopped) -> None:
    theirs = evaluation("late", weights=written(dead, b"late"))
    late = stopped.start(lambda: dead.commit(theirs))
    with replace(dead, fence=None).hold(False, print) as taken:
        taken.clear()
        stopped.go(late)
    assert isinstance(late.exception(), RunError)
    assert dead.record(Evaluation) is None


def test_who_clears_a_step_away_too_late_takes_no_record_of_another(
    dead: StepDir, stopped: Stopped, tmp_path: Path
) -> None:
    written(dead, b"half made")
    late = stopped.start(dead.clear)
    with replace(dead, fence=None).hold(False, print) as taken:
        record = taken.commit(evaluation("ours", weights=written(taken, b"ours")))
    stopped.go(late)
    assert isinstance(late.exception(), FencedOffError)
    assert (taken.record(Evaluation), weights(record, taken, tmp_path)) == (record, b"ours")


def test_a_late_record_that_is_the_first_is_adopted_whole(dead: StepDir, stopped: Stopped, tmp_path: Path) -> None:
    dead.write("attempt/state", b"from which the other goes on")
    theirs = evaluation("late", weights=written(dead, b"late"))
    late = stopped.start(lambda: dead.commit(theirs))
    with replace(dead, fence=None).hold(False, print) as taken:
        stored = written(taken, b"ours")
        stopped.go(late)
        assert taken.read("1/attempt/state") == b"from which the other goes on"
        record = taken.commit(evaluation("ours", weights=stored))
    assert (record, weights(record, taken, tmp_path)) == (theirs, b"late")
    assert taken.newest() == {"weights": "1/weights"}
