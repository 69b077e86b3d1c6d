"""Reaching and starting Ray: whose fault it is when that fails; and which device work is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, LostError
from pipeline.execution.engine import Engine
from pipeline.models import device
from pipeline.store.step_store import StepDir

ELSEWHERE = "127.0.0.1:6379"
LATE = "The current node timed out during startup."
LOST = f"did not start: {LATE}.*run the same command again"


@pytest.mark.parametrize(
    ("address", "raised", "found", "needle"),
    [
        (
            ELSEWHERE,
            ConnectionError("nobody listens"),
            ConfigError,
            r"at 127\.0\.0\.1:6379: nobody listens.*RAY_ADDRESS",
        ),
        (ELSEWHERE, TimeoutError("nobody answers"), ConfigError, r"at 127\.0\.0\.1:6379: nobody answers"),
        (ELSEWHERE, Exception(LATE), LostError, LOST),
        (None, Exception(LATE), LostError, LOST),
        (None, RuntimeError(LATE), LostError, LOST),
        (None, TimeoutError(LATE), LostError, LOST),
        (None, PermissionError("/tmp/ray"), ConfigError, "at this machine: /tmp/ray"),
        (ELSEWHERE, TypeError("a mistake of ours"), TypeError, "a mistake of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_ray_from_starting_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, address: str | None, raised: Exception, found: type[Exception], needle: str
) -> None:
    def init(**settings: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    engine = Engine(Resources(ray_address=address))
    with pytest.raises(found, match=needle) as caught:
        engine.start()
    assert caught.type is found
    engine.close()


@pytest.fixture
def step_dir(tmp_path: Path) -> StepDir:
    return StepDir(str(tmp_path / "store"), "distill", "0" * 32, str(tmp_path / "scratch"))


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda:0")])
def test_training_in_this_process_has_the_gpu_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, step_dir: StepDir, gpus: int, expected: str
) -> None:
    monkeypatch.setattr(device, "this_device", lambda: torch.device("cuda", 0))  # Ray would try a GPU that is not there
    given: list[str] = []

    def worker(*, device: Any, report: Any) -> None:
        given.append(str(device))

    Engine(Resources(workers=0, gpus_per_worker=gpus)).train(worker, step_dir, lambda *progress, points=(): None)
    assert given == [expected]


def test_a_task_asks_for_the_gpus_it_is_given(monkeypatch: pytest.MonkeyPatch, step_dir: StepDir) -> None:
    asked: list[float] = []

    def tasks(self: Engine, work: list[Callable[[], int]], step_dir: StepDir, advance: Any, gpus: float) -> list[int]:
        asked.append(gpus)
        return [piece() for piece in work]

    monkeypatch.setattr(Engine, "tasks", tasks)
    engine = Engine(Resources(gpus_per_worker=0.5))
    assert [engine.task(lambda: 1, step_dir), engine.task(lambda: 2, step_dir, gpus=0.5)] == [1, 2]
    assert asked == [0, 0.5]
