"""A disk that takes no more: the paragraph that says so, and nothing left of what was being written.

Nobody may fill a disk here, so files may not grow, which is refused in the same place in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import ERRORS, FullDiskError, LostError, RunError, writing_to
from pipeline.store.copies import Copies
from pipeline.store.objects import open_objects
from pipeline.store.step_store import StepDir

BIG = b"x" * 200_000


@contextlib.contextmanager
def no_file_grows(beyond: int = 100_000) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def test_a_store_that_is_full_says_where_and_keeps_what_it_has(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "store"))
    objects.write("a/old", b"old")
    (tmp_path / "big").write_bytes(BIG)
    writes: list[Callable[[], object]] = [
        lambda: objects.write("a/old", BIG),
        lambda: objects.create("a/new", BIG),
        lambda: objects.swap("a/old", b"old", BIG),
        lambda: objects.upload("a/old", tmp_path / "big"),
    ]
    for write in writes:
        with no_file_grows(), pytest.raises(FullDiskError) as caught:
            write()
        said = str(caught.value)
        assert said.startswith(f"{tmp_path}/store/a/")
        assert "cannot be written: File too large; " in said
        assert " bytes are free there." in said
        assert "resources.storage_uri" in said
    assert objects.read("a/old") == b"old"
    assert files(tmp_path / "store") == ["old"]


def with_torch(path: Path) -> None:
    save_file({"x": torch.zeros(50_000)}, path)


def with_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file:
        file.write(BIG)


@pytest.mark.parametrize("write", [with_torch, with_arrow, lambda path: path.write_bytes(BIG)])
def test_a_scratch_folder_that_is_full_is_told_whichever_library_met_it(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    step_dir = StepDir(str(tmp_path / "store"), "distill", "0" * 32, str(tmp_path / "scratch"))
    with (
        pytest.raises(FullDiskError, match=r"/scratch cannot be written: File too large.*resources\.local_cache_dir"),
        step_dir.scratch_folder() as folder,
        no_file_grows(),
    ):
        write(folder / "file")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_copy_that_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    with no_file_grows(), pytest.raises(FullDiskError, match=r"resources\.local_cache_dir"):
        Copies(tmp_path).get("an object", lambda path: path.write_bytes(BIG))
    assert files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_spent_quota_are_told_apart(tmp_path: Path, code: int) -> None:
    with pytest.raises(FullDiskError, match=os.strerror(code)), writing_to(tmp_path / "no" / "file", "knob"):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), writing_to(tmp_path, "knob"):
        raise PermissionError(errno.EACCES, "not yours")
    with pytest.raises(RunError, match=r"^No space left on device$"), writing_to(tmp_path, "knob"):
        raise RunError("No space left on device")  # it is said already


def test_workers_send_it_and_whoever_can_do_without_a_write_passes_over_it() -> None:
    error = FullDiskError("the disk is full")
    assert str(pickle.loads(pickle.dumps(error))) == "the disk is full"
    assert ERRORS["FullDiskError"] is FullDiskError
    assert isinstance(error, LostError)
    assert isinstance(error, OSError)
