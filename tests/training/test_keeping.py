"""When checkpoints are made, what is in them, and that training goes on while they are stored."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.commands.options import interruptible
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.training import Distill, Finetune
from pipeline.errors import FencedOffError, FullDiskError, RunError
from pipeline.execution.engine import Engine
from pipeline.store.lease import Lease
from pipeline.store.step_store import StepDir
from pipeline.training import checkpoints
from pipeline.training.checkpoints import latest_checkpoint, load_checkpoint
from pipeline.training.trainer import Trainer, TrainingJob
from tests.store.test_disk import no_file_grows
from tests.training.cases import Case, with_workers

LOW = Quant(bits="2-2-8")
FINETUNE = Finetune(steps=12, batch_size=4, lr=2e-3, dropout=0.0, eval_every=6, eval_rows=4)
DISTILL = Distill(steps=12, batch_size=4, lr=2e-3, negatives=4, eval_every=6, eval_rows=4)
WAIT_S = 60


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("keeping"))


def kept(job: TrainingJob) -> int:
    """The step of the last checkpoint that is stored whole; 0 if there is none."""
    fields = latest_checkpoint(job.dir)
    return 0 if fields is None else load_checkpoint(job.dir, fields)[1].step


def writers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoints")]


def before_step(loop: Trainer, step: int, act: Any) -> None:
    take = loop.train_step

    def taking(number: int) -> dict[str, torch.Tensor]:
        if number == step:
            act()
        return take(number)

    loop.train_step = taking  # type: ignore[method-assign]


@pytest.mark.parametrize("recipe", [DISTILL, FINETUNE], ids=["distill", "finetune"])
def test_steps_are_taken_while_a_checkpoint_is_stored_as_it_was(
    case: Case, recipe: Distill | Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = case.loop(job := case.run(recipe, "beside", checkpoint_minutes=5), LOW)
    upload, further, states = StepDir.upload, threading.Event(), list[Path]()

    def uploading(step_dir: StepDir, name: str, path: Path) -> Any:
        if "/state-" in name:
            assert further.wait(WAIT_S), "training waits for its checkpoint"
            states.append(case.root / Path(name).name)
            states[-1].write_bytes(path.read_bytes())
        return upload(step_dir, name, path)

    monkeypatch.setattr(StepDir, "upload", uploading)
    begin, then = loop.writer.begin, list[dict[str, torch.Tensor]]()

    def beginning(tensors: dict[str, torch.Tensor], progress: Any) -> None:
        then.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        begin(tensors, progress)

    loop.writer.begin = beginning  # type: ignore[method-assign]
    before_step(loop, 9, further.set)  # four steps and a validation after step 5
    loop.run()
    assert [path.name for path in states] == ["state-000000005.safetensors", "state-000000010.safetensors"]
    for path, expected in zip(states, then, strict=True):
        stored = load_file(path)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert kept(job) == 10
    assert writers() == []


def test_one_copy_of_what_trains_is_made_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = case.loop(case.run(FINETUNE, "one", checkpoint_minutes=1), LOW)
    told: list[str] = []

    def telling(name: str, then: str) -> None:
        call = getattr(checkpoints, name)

        def told_of(*given: Any) -> Any:
            returned = call(*given)
            told.append(then)
            return returned

        monkeypatch.setattr(checkpoints, name, told_of)

    telling("copied", "copied")
    telling("write_checkpoint", "stored")
    loop.run()
    assert told == ["copied", "stored"] * 11


@pytest.mark.parametrize("minutes", [7, 11], ids=["while it trains", "at the end"])
def test_a_lease_that_is_lost_while_a_checkpoint_is_stored_ends_training(
    case: Case, minutes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = case.loop(job := case.run(FINETUNE, f"lost{minutes}", checkpoint_minutes=minutes), LOW)
    folder, ended, write = Path(job.dir.uri), threading.Event(), checkpoints.write_checkpoint

    def writing(*given: Any) -> None:
        assert minutes == 7 or ended.wait(WAIT_S)
        (folder / "lease.json").write_bytes(Lease(None, 2).to_json())
        write(*given)

    def report(done: int, *_: Any, points: Any = ()) -> None:
        if done == 12:
            ended.set()

    def written() -> None:
        if minutes == 7:
            wait([future for future in [loop.writer._writing] if future is not None])

    monkeypatch.setattr(checkpoints, "write_checkpoint", writing)
    before_step(loop, 9, written)
    loop.report = report
    with pytest.raises(FencedOffError):
        loop.run()
    assert ended.is_set() == (minutes == 11)
    assert [path.name for path in folder.rglob("*") if not path.name.startswith(".")] == ["lease.json"]
    assert writers() == []


def test_training_that_fails_keeps_the_checkpoint_that_it_had_begun(case: Case) -> None:
    loop = case.loop(job := case.run(FINETUNE, "fails", checkpoint_minutes=5), LOW)

    def fail() -> None:
        raise InterruptedError

    before_step(loop, 5, fail)
    with pytest.raises(InterruptedError):
        loop.run()
    assert kept(job) == 5
    assert writers() == []


def test_a_full_disk_ends_training_and_leaves_the_checkpoint_before(case: Case) -> None:
    loop = case.loop(job := case.run(FINETUNE, "full", checkpoint_minutes=5), LOW)
    with contextlib.ExitStack() as limits:
        before_step(loop, 6, lambda: limits.enter_context(no_file_grows()))
        with pytest.raises(FullDiskError, match=r"scratch cannot be written: File too large; [0-9,]+ bytes are free"):
            loop.run()
    assert kept(job) == 5
    assert list((case.root / "scratch").glob("tmp*")) == []


def test_workers_make_checkpoints_at_the_same_steps_by_one_clock(case: Case) -> None:
    job = case.run(FINETUNE, "clock", checkpoint_minutes=4)

    def work(rank: int) -> list[int]:
        loop = case.loop(job, LOW)
        if rank == 1:
            loop.clock = lambda: 1e9 * (1 + loop.progress.step)
        keep, steps = loop._keep, list[int]()

        def keeping() -> None:
            steps.append(loop.progress.step)
            keep()

        loop._keep = keeping  # type: ignore[method-assign]
        loop.run()
        return steps

    assert with_workers(2, case.root, work) == [[4, 8], [4, 8]]


def test_an_end_that_one_worker_is_told_of_makes_a_checkpoint(case: Case) -> None:
    job = case.run(FINETUNE, "announced", checkpoint_minutes=1000)

    def work(rank: int) -> list[Any]:
        loop = case.loop(job, LOW)
        loop.ending = lambda: rank == 1 and loop.progress.step >= 7
        told: list[Any] = []

        def report(done: int, total: int, note: str, points: Any = ()) -> None:
            told.append([done, note, kept(job)])

        loop.report = report
        loop.run()
        return told

    told, _ = with_workers(2, case.root, work)
    stored = {done: step for done, _, step in told}
    assert (stored[6], stored[7], stored[12]) == (0, 7, 7)  # once, and training goes on until it is ended
    assert [done for done, note, _ in told if note.endswith("checkpoint before the end that was announced")] == [7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_asked_to_end_makes_a_checkpoint_first(case: Case, number: int) -> None:
    job = case.run(FINETUNE, f"asked{number}", checkpoint_minutes=1000)
    steps: list[int] = []

    def worker(*, device: Any, report: Any, ending: Any) -> None:
        loop = case.loop(job, LOW)
        loop.report, loop.ending = report, ending
        before_step(loop, 7, lambda: os.kill(os.getpid(), number))
        loop.run()

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with interruptible(), pytest.raises((KeyboardInterrupt, SystemExit)):  # the latter where Ray set its own handler
        Engine(Resources(workers=0)).train(worker, job.dir, lambda done, *_, points=(): steps.append(done))
    assert steps[-1] == kept(job) == 8  # the step was finished
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert writers() == []


def test_weights_that_are_no_numbers_are_not_kept(case: Case) -> None:
    """A loss is read before the weights move, so it may yet be one."""
    loop = case.loop(job := case.run(FINETUNE, "diverged", checkpoint_minutes=3), LOW)
    step = loop.optimizers.step

    def stepping(number: int, steps: int) -> None:
        step(number, steps)
        if number == 8:
            next(iter(loop.model.parameters())).data.view(-1)[0] = torch.nan

    loop.optimizers.step = stepping  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"is nan at step 9\. .*The last checkpoint, of step 6, is kept\."):
        loop.run()
    fields = latest_checkpoint(job.dir)
    assert fields is not None
    tensors, progress = load_checkpoint(job.dir, fields)
    assert progress.step == 6
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def too_large(loop: Trainer, fits: int, of_first: int) -> None:
    """Memory holds so many rows, and so many of the first ones of a batch."""
    backward = loop._backward

    def limited(step: int, row_ids: list[int], then: Any, shares: Any) -> Any:
        if len(row_ids) > (of_first if row_ids == loop._micro_batches(step)[0] else fits):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore that nobody reads.")
        return backward(step, row_ids, then, shares)

    loop._backward = limited  # type: ignore[method-assign]


def test_rows_that_memory_does_not_hold_are_halved_and_the_batch_stays(case: Case) -> None:
    recipe = DISTILL.model_copy(update={"batch_size": 12})
    job = case.run(recipe, "halved", micro_batch=5, checkpoint_minutes=4)
    loop, notes = case.loop(job, LOW), list[str]()
    loop.report = lambda done, total, note, points=(): notes.append(note)
    too_large(loop, fits=3, of_first=5)
    loop.run()
    small = case.loop(other := case.run(recipe, "small", micro_batch=2, checkpoint_minutes=4), LOW)
    small.run()
    ours, theirs = (load_checkpoint(run.dir, latest_checkpoint(run.dir) or {})[0] for run in (job, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [point for point in loop.progress.history if "micro_batch" in point] == [{"step": 0, "micro_batch": 2}]
    assert "micro_batch is 2 from here on, as memory allows" in notes
    again, wider = case.loop(job, LOW), case.loop(job, LOW)
    again._resume()
    assert (again.micro_batch, again.progress.step) == (2, 8)
    assert [point for point in again.progress.history if "micro_batch" in point] == [{"step": 0, "micro_batch": 2}]
    wider.micro_batch = 4  # who asks for others has them tried
    wider._resume()
    assert wider.micro_batch == 4


def test_one_row_that_memory_does_not_hold_ends_training(case: Case) -> None:
    loop = case.loop(case.run(FINETUNE, "nothing", micro_batch=4), LOW)
    too_large(loop, fits=0, of_first=0)
    with pytest.raises(RunError) as caught:
        loop.run()
    said = str(caught.value)
    assert "at step 0: CUDA out of memory. Tried to allocate 2 GiB. Training" in said
    assert "passed rows 1 at a time (resources.micro_batch is 4)" in said
    assert all(knob in said for knob in ("resources.inference_batch", "activation_checkpointing: true"))


def test_workers_of_which_one_has_too_little_memory_begin_again_with_half(case: Case) -> None:
    job = case.run(FINETUNE, "group", micro_batch=2)

    def work(rank: int) -> list[Any]:
        loop = case.loop(job, LOW)
        if rank == 1:
            too_large(loop, fits=1, of_first=1)
        loop.run()
        return [loop.micro_batch, [point for point in loop.progress.history if "micro_batch" in point]]

    with pytest.raises(Exception, match="BeginAgainError: memory is too small for micro_batch 2; next is 1"):
        with_workers(2, case.root, work)
    assert with_workers(2, case.root, work) == [[1, [{"step": 0, "micro_batch": 1}]]] * 2
