"""Eight processes at once for one step: one works, is killed, another does; the others wait and return its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.chaos.processes import start
from tests.flow.racers import RACERS
from tests.store.test_step_store import EVERYWHERE, serve_s3


@pytest.mark.parametrize("place", EVERYWHERE)
def test_of_eight_one_works_and_the_others_wait_for_it_by_name_and_return_its_result(
    tmp_path: Path, tiny_fields: Callable[..., dict[str, Any]], place: str
) -> None:
    with nullcontext(str(tmp_path)) if place == "directory" else serve_s3() as root:
        fields = tiny_fields(tmp_path, resources={"storage_uri": f"{root}/store"})
        command = [sys.executable, "-m", "tests.flow.racers", json.dumps(fields), str(tmp_path / "go")]
        racers = start(command, stdout=subprocess.PIPE, text=True)
        try:
            first = worker_and_those_who_wait(racers, RACERS - 1)
            os.kill(first, signal.SIGKILL)
            second = worker_and_those_who_wait(racers, RACERS - 2)
            assert second != first
            (tmp_path / "go").touch()
            said = [json.loads(line) for line in racers.communicate()[0].splitlines()]
        finally:
            racers.kill()
            racers.wait()
    ends = {words["pid"]: words for words in said if words["does"] == "end"}
    assert ends[second]["status"] == "done"
    assert sorted(end["status"] for end in ends.values()) == ["done"] + ["reused"] * (RACERS - 2)
    assert len({end["record"] for end in ends.values()}) == 1


def worker_and_those_who_wait(racers: subprocess.Popen[str], waiting: int) -> int:
    """Return who works, once so many have said that they wait for it."""
    worker, owners = 0, dict[int, int]()
    assert racers.stdout is not None
    while not worker or list(owners.values()).count(worker) < waiting:
        said = json.loads(racers.stdout.readline())
        if said["does"] == "work":
            assert not worker
            worker = said["pid"]
        else:
            owners[said["pid"]] = said["owner"]
    return worker
