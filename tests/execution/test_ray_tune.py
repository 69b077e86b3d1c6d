"""The folder that Tune works in: of one process, and taken away with it or after it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.execution.ray_tune import own_folder

KILLED = """
import os, signal
from pathlib import Path
from pipeline.execution.ray_tune import own_folder
with own_folder() as folder:
    (Path(folder) / "state").mkdir()
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asked anew
    foreign = tmp_path / "bitmill-tune-foreign"
    foreign.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert left.parent == tmp_path, killed.stderr
    assert left.exists()
    with own_folder() as first, own_folder() as second:
        assert set(tmp_path.iterdir()) == {foreign, Path(first), Path(second)}
    assert list(tmp_path.iterdir()) == [foreign]
