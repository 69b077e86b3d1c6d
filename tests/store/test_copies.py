"""Copies on a node: fetched once, within a budget, and never taken from whoever is about to read them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, DamagedError
from pipeline.store import copies as copies_module
from pipeline.store.copies import ABANDONED_S, IN_USE_S, Copies, copies_in
from pipeline.store.objects import open_objects
from pipeline.store.records import Evaluation, StoredFile
from pipeline.store.step_store import StepDir
from tests.store.test_step_store import KEY, file_of, serve_s3

MIB = 2**20
Usage = namedtuple("Usage", "total used free")
EVICTOR = """
import sys
from pathlib import Path
from pipeline.store.copies import Copies
print(flush=True)
while not Path(sys.argv[1], "stop").exists():
    Copies(Path(sys.argv[1])).make_room(0)
"""


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    return Copies(tmp_path)


def make(copies: Copies, name: str, used_s_ago: float = 0.0) -> Path:
    """A copy of one MiB that was used some time ago."""
    path = copies.get(name, lambda path: path.write_bytes(name[:1].encode() * MIB))
    os.utime(path, (time.time() - used_s_ago, path.stat().st_mtime))
    return path


def left(*paths: Path) -> list[bool]:
    return [path.exists() for path in paths]


def test_a_copy_is_fetched_once_and_keeps_the_time_of_its_content(copies: Copies) -> None:
    path = make(copies, "a", used_s_ago=5000)
    before = path.stat()
    assert copies.get("a", lambda path: pytest.fail("fetched again")) == path
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert after.st_atime_ns > before.st_atime_ns
    assert make(copies, "b") != path


def test_those_used_longest_ago_go_until_the_others_fit(copies: Copies) -> None:
    old, older, oldest = (make(copies, name, 3 * IN_USE_S + n * 100) for n, name in enumerate("abc"))
    copies.make_room(4 / 1024)
    assert left(old, older, oldest) == [True, True, True]
    copies.get("b", lambda path: None)  # which is used again
    make(copies, "d")
    copies.make_room(2 / 1024)
    assert left(old, older, oldest) == [False, True, False]


def test_what_is_about_to_be_opened_stays_whatever_the_budget(copies: Copies) -> None:
    new, old = make(copies, "a", IN_USE_S - 60), make(copies, "b", IN_USE_S + 60)
    copies.make_room(1e-9)
    assert left(new, old) == [True, False]


def test_some_of_the_disk_stays_free(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    paths = [make(copies, name, 2 * IN_USE_S + n) for n, name in enumerate("abc")]
    copies.make_room(100)
    assert left(*paths) == [True, True, False]
    paths = [make(copies, name, IN_USE_S / 2 + n) for n, name in zip((9, 8, -9), "abc", strict=True)]
    copies.make_room(100)  # where the disk is short, what was used a while ago goes the sooner, and looks are frequent
    assert left(*paths) == [False, True, True]


def test_processes_that_make_room_take_no_copy_from_whoever_was_handed_it(copies: Copies, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVICTOR, str(tmp_path)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(other.stdout is not None and other.stdout.readline() for other in others)
        for turn in range(100):
            path = copies.get(str(turn % 30), lambda path: path.write_bytes(b"x"))
            assert path.read_bytes() == b"x"
            copies.make_room(0)
            assert path.exists()
            os.utime(path, (time.time() - 2 * IN_USE_S, path.stat().st_mtime))
    finally:
        (tmp_path / "stop").touch()
        ended = [other.wait(60) for other in others]
        for other in others:
            other.communicate()
    assert ended == [0, 0]


def test_a_copy_that_is_handed_out_while_room_is_made_is_there(
    copies: Copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(copies, "a", 2 * IN_USE_S)
    looked, handed, used = threading.Event(), threading.Event(), Copies._used

    def slow(self: Copies) -> Iterator[tuple[float, int, Path]]:
        yield from list(used(self))
        looked.set()
        handed.wait(0.3)  # the other may have to wait for us

    monkeypatch.setattr(Copies, "_used", slow)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(Copies(tmp_path).make_room, 0)
        assert looked.wait(30)
        assert copies.get("a", lambda path: path.write_bytes(b"again")) == old
        handed.set()
        making.result(30)
    assert old.exists()


def test_a_scratch_folder_without_locks_is_refused(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ConfigError, match=r"no locks \(Function not implemented\). Set resources.local_cache_dir"):
        make(copies, "a")


def test_what_killed_downloads_left_goes_and_what_is_being_fetched_stays(copies: Copies, tmp_path: Path) -> None:
    make(copies, "a")
    abandoned, fetched = (tmp_path / "copies" / "unfinished" / name for name in ("x", "y.AbCd"))
    for path, age_s in ((abandoned, 2 * ABANDONED_S), (fetched, ABANDONED_S / 2)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    copies.make_room(100)
    assert left(abandoned, fetched) == [False, True]


def test_a_download_that_fails_leaves_nothing(copies: Copies, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the network is away")

    with pytest.raises(OSError, match="away"):
        copies.get("a", fail)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
    assert make(copies, "a").stat().st_size == MIB


def test_the_folder_is_looked_through_only_where_enough_was_fetched(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, used = [], Copies._used

    def counting(self: Copies) -> Iterator[tuple[float, int, Path]]:
        looks.append(1)
        return used(self)

    monkeypatch.setattr(Copies, "_used", counting)
    for number in range(100):
        make(copies, str(number))
        copies.make_room(200 / 1024)  # of which a twentieth is ten copies
    assert len(looks) == 1 + 99 // 10


def test_a_step_reads_through_copies_within_its_budget(tmp_path: Path) -> None:
    with serve_s3() as bucket:
        step = StepDir(f"{bucket}/{uuid.uuid4()}", Evaluation.stage, KEY, str(tmp_path / "scratch"), None, 2.5 / 1024)
        with step.hold(False, print) as held:
            assert held.local_cache_gib == step.local_cache_gib
            stored: dict[str, StoredFile] = {
                name: held.upload(name, file_of(tmp_path, name.encode() * MIB)) for name in "abcd"
            }
        first = step.local("a", stored["a"])
        with open(first, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            folder = step.folder({"b": stored["b"]}, "")
            for path in (first, (folder / "b").resolve()):
                os.utime(path, (time.time() - 2 * IN_USE_S, path.stat().st_mtime))
            step.local("c", stored["c"])
            step.local("d", stored["d"])
            assert not first.exists()
            assert mapped[:] == b"a" * MIB  # whoever reads it, reads on
        assert not (folder / "b").exists()
        assert (step.folder({"b": stored["b"]}, "") / "b").read_bytes() == b"b" * MIB  # whoever asks, is given it
        assert step.local("a", stored["a"]).read_bytes() == b"a" * MIB
        assert copies_in((tmp_path / "scratch").resolve()) is copies_in((tmp_path / "scratch").resolve())


def test_a_store_that_lies_below_the_scratch_folder_is_read_as_it_is(tmp_path: Path) -> None:
    """And is no copy, even where its place is called so."""
    for root in (tmp_path / "store", tmp_path / "copies"):
        with StepDir(str(root), Evaluation.stage, KEY, str(tmp_path)).hold(False, print) as step:
            stored = step.write("a", b"sound")
            path = step.local("a", stored)
            assert (path.read_bytes(), path.is_relative_to(root)) == (b"sound", True)
            path.write_bytes(b"other")
            with pytest.raises(DamagedError, match="does not match its checksum"):
                step.local("a", stored)
            assert path.read_bytes() == b"other"


def test_a_folder_is_whole_though_it_takes_long_to_fetch_and_exceeds_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = time.time()

        def time(self) -> float:
            return self.now

        def time_ns(self) -> int:
            return int(self.now * 10**9)

    clock = Clock()
    monkeypatch.setattr(copies_module, "time", clock)
    with serve_s3() as bucket:
        step = StepDir(f"{bucket}/{uuid.uuid4()}", Evaluation.stage, KEY, str(tmp_path / "scratch"), None, 1 / 1024)
        with step.hold(False, print) as held:
            files = {name: held.upload(name, file_of(tmp_path, name.encode() * MIB)) for name in "abc"}
        client: Any = open_objects(step.storage_uri)
        download = client.client.download_file

        def slow(*arguments: Any, **options: Any) -> None:
            download(*arguments, **options)
            clock.now += 2 * IN_USE_S

        monkeypatch.setattr(client.client, "download_file", slow)
        folder = step.folder(files, "")
        assert {path.name: path.read_bytes()[:1] for path in folder.iterdir()} == {"a": b"a", "b": b"b", "c": b"c"}
        other = Copies(tmp_path / "scratch")
        other.make_room(1 / 1024)  # to another process too, all were used just now
        assert all(path.exists() for path in folder.iterdir())
