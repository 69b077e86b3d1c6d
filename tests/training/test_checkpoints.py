"""Which checkpoint an attempt goes on from, whatever an attempt that was taken over writes late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.store.lease import Lease
from pipeline.store.objects import open_objects
from pipeline.store.step_store import StepDir
from pipeline.training.checkpoints import Progress, latest_checkpoint, load_checkpoint, write_checkpoint


@pytest.fixture
def step(tmp_path: Path) -> StepDir:
    return StepDir(str(tmp_path / "store"), "distill", "0" * 32, str(tmp_path / "scratch"))


def write(attempt: StepDir, step: int) -> None:
    write_checkpoint(attempt, {"x": torch.tensor([step])}, Progress(step=step))


def newest_step(step_dir: StepDir) -> int | None:
    fields = latest_checkpoint(step_dir)
    if fields is None:
        return None
    tensors, progress = load_checkpoint(step_dir, fields)
    assert tensors["x"].item() == progress.step
    return progress.step


def test_an_attempt_goes_on_from_the_one_before_until_it_has_a_checkpoint_of_its_own(step: StepDir) -> None:
    with step.hold(False, print) as first:
        assert newest_step(first) is None
        write(first, 9)
        write(first, 10)
        assert [*first.sizes("attempt/checkpoint-")] == ["1/attempt/checkpoint-000000010.json"]
    with step.hold(False, print) as second:
        assert newest_step(second) == 10
        write(second, 12)
        assert newest_step(second) == 12
        assert {place.partition("/")[0] for place in second.sizes()} == {"2"}


def test_what_an_attempt_that_was_taken_over_writes_late_is_not_gone_on_from(step: StepDir) -> None:
    objects, lease = open_objects(step.storage_uri), "distill/" + "0" * 32 + "/lease.json"
    with step.hold(False, print) as first:
        write(first, 10)
    with step.hold(False, print) as second:
        write(second, 15)
        theirs = objects.read(lease)
        objects.write(lease, Lease(None, 1).to_json())  # as the first saw it
        write(first, 30)
        objects.write(lease, theirs)
        assert newest_step(second) == 15
        second.delete(second.place("attempt/checkpoint-000000015.json"))
        assert newest_step(second) == 30  # whole, and all that is left
