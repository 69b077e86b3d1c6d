"""Copies on a node: fetched once, within a budget, and never taken from whoever is about to read them."""

from __future__ import annotations

import mmap
import os
import shutil
import time
import uuid
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store.copies import ABANDONED_S, IN_USE_S, Copies, copies_in
from pipeline.store.records import Evaluation, StoredFile
from pipeline.store.step_store import StepDir
from tests.store.test_step_store import KEY, file_of, serve_s3

MIB = 2**20
Usage = namedtuple("Usage", "total used free")


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
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
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
