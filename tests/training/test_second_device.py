"""Whole training jobs on a device other than the CPU: nothing is left behind on it, least of all by a resumed run.

The labelled device computes on the CPU, so what comes out has to be the same to the last bit, whether it was resumed or
not, and, where no teacher is in bf16, there and here; a GPU has to be close.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.sources.models import ModelSource
from pipeline.stages import distill, finetune
from pipeline.stages.stage import StepJob
from pipeline.store.keys import recipe_of
from pipeline.training.trainer import Trainer, TrainingJob
from tests.second_device import SECOND, Event, host_reads, second_device
from tests.training.cases import Case, run_until, with_workers
from tests.training.test_task_training import ROWS

CPU = torch.device("cpu")
SOON = 1e-9  # minutes
COMMON: dict[str, Any] = {"steps": 3, "batch_size": 2, "eval_every": 1, "eval_rows": 2, "lr": 2e-3}
DISTILLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cached": ({"negatives": 4}, {}),
    "draws": ({"contrast_weight": 0.0}, {}),
    "student": (
        {"negatives_from": "student", "contrast_layer": -2},
        {"quantizer": "pact", "attention": "qkv_probabilities", "activation_range": "tensor"},
    ),
    "vocabulary": (
        {"negatives_from": "vocabulary", "fade_in": 0.5},
        {"quantizer": "lsq_symmetric", "scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"},
    ),
    "batch": ({"negatives_from": "batch"}, {"quantizer": "laq", "granularity": {"per_group": 32}}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("devices"))


def interrupted(train: Callable[..., None], job: StepJob, device: torch.device, stop_at: int | None = 2) -> Any:
    """Run a stage's training to its end, once stopped and begun again; what it stores for its record."""

    def report(done: int, total: int, note: str, points: Any = ()) -> None:
        if done == stop_at and not note.startswith("resumed"):
            raise InterruptedError

    if stop_at is not None:
        with pytest.raises(InterruptedError):
            train(job, device, report)
    train(job, device, lambda *_, points=(): None)
    return json.loads(job.dir.read("1/attempt/result.json"))


@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_a_distillation_that_is_resumed_ends_as_another_and_near_the_cpus(
    case: Case, device: torch.device, kind: str
) -> None:
    options, quant = DISTILLATIONS[kind]
    recipe = {"distill": recipe_of(Distill(**COMMON, **options)), "quant": recipe_of(Quant(**quant))}
    cache = {"cached": partial(case.cache, "float16"), "draws": case.draws}.get(kind, lambda: None)()
    jobs = [case.step_job(recipe, cache=cache, micro_batch=1, checkpoint_minutes=SOON) for _ in range(3)]
    ours = interrupted(distill._train, jobs[0], device)
    theirs = interrupted(distill._train, jobs[1], device, stop_at=None)
    on_cpu = interrupted(distill._train, jobs[2], CPU, stop_at=None)
    histories = [json.loads(job.dir.read("1/history.json")) for job in jobs]
    looks = [json.loads(job.dir.read("1/modules.json")) for job in jobs]
    assert [look["step"] for look in looks[0]] == [look["step"] for look in looks[1]] == [0, 1, 2, 3]
    if device is SECOND:
        assert (ours["digest"], histories[0], looks[0]) == (theirs["digest"], histories[1], looks[1])
        if kind == "draws":  # of which the cache was made here
            assert (ours["digest"], histories[0], looks[0]) == (on_cpu["digest"], histories[2], looks[2])
    for other in (theirs, on_cpu):
        assert ours["validation_nats"] == pytest.approx(other["validation_nats"], rel=0.02)


@pytest.mark.parametrize("task", ROWS)
def test_tasks_of_several_lengths_a_row_train_as_on_the_cpu(task: str, device: torch.device, tmp_path: Path) -> None:
    case = Case.of(tmp_path, *ROWS[task]())
    recipe = {"distill": recipe_of(Distill(**COMMON)), "quant": recipe_of(Quant())}
    ours, theirs = (
        interrupted(distill._train, case.step_job(recipe, micro_batch=1, checkpoint_minutes=SOON), where, stop_at)
        for where, stop_at in ((device, 2), (CPU, None))
    )
    assert ours["validation_nats"] == pytest.approx(theirs["validation_nats"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_teacher_that_is_resumed_ends_as_on_the_cpu(case: Case, device: torch.device, optimizer: str) -> None:
    recipe = {
        "finetune": recipe_of(Finetune(**COMMON, dropout=0.0, optimizer=optimizer)),
        "model": {"content": {}, "family": "gpt2"},
    }
    locations = {"model": ModelSource(case.teacher, {}).location()}
    jobs = [case.step_job(recipe, locations=locations, micro_batch=1, checkpoint_minutes=SOON) for _ in range(2)]
    ours = interrupted(finetune._train, jobs[0], device)
    theirs = interrupted(finetune._train, jobs[1], CPU, stop_at=None)
    exact = device is SECOND and optimizer == "adam"  # Muon orthogonalises in bf16 away from the CPU
    assert ours["validation_nats"] == pytest.approx(theirs["validation_nats"], rel=0 if exact else 0.02)


STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    **{name: (PRESETS[name]["distill"], PRESETS[name]["quant"]) for name in ("best", "smallest")},
    "student": ({"negatives_from": "student"}, {"quantizer": "pact"}),
    "vocabulary": DISTILLATIONS["vocabulary"],
    "batch": ({"negatives_from": "batch"}, {}),
    "draws": DISTILLATIONS["draws"],
    "online": ({"contrast_layer": -2}, {}),
    "finetune": ({"dropout": 0.0}, {}),
}


def run_of(case: Case, kind: str, **options: Any) -> tuple[TrainingJob, Quant]:
    """A run of a kind of steps, with gradients clipped as they are by default."""
    of_kind, quant = STEPS[kind]
    recipe = (Finetune if kind == "finetune" else Distill)(**{**COMMON, "steps": 9, **of_kind, **options})
    keep = {"draws": case.draws, "finetune": lambda: None, "online": lambda: None}.get(
        kind, partial(case.cache, "float16")
    )
    return case.run(recipe, f"reads-{kind}", keep(), micro_batch=1), Quant(**quant)


def reads_of_steps(loop: Trainer) -> tuple[list[str], list[str]]:
    """What a step reads of the device, and what one reads whose loss is asked for."""
    loop.train_step(0)
    with host_reads() as of_step:
        loop.train_step(1)
    with host_reads() as of_loss:
        float(loop.train_step(2)["loss"])
    return of_step, of_loss


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("kind", STEPS)
def test_no_step_waits_for_a_value_of_the_device(case: Case, kind: str) -> None:
    run, quant = run_of(case, kind)
    with second_device() as device:
        assert reads_of_steps(case.loop(run, quant, device)) == ([], ["_local_scalar_dense"])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("kind", ["paper", "batch"])
def test_no_step_of_two_workers_waits_for_a_value_of_the_device(case: Case, kind: str) -> None:
    """Not even to know of which ids the other has states for the memory bank, and of how many."""
    run, quant = run_of(case, kind, batch_size=4)

    def work(rank: int) -> Any:
        with second_device() as device:
            return reads_of_steps(case.loop(run, quant, device))

    assert with_workers(2, case.root, work) == [[[], ["_local_scalar_dense"]]] * 2


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_losses_are_read_from_a_gpu_once_in_ten_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def reads_of(steps: int) -> list[str]:
        run, quant = run_of(case, "paper", steps=30, eval_every=30)
        with second_device() as device, host_reads() as reads:
            run_until(case.loop(run, quant, device), steps)
        return reads

    before = reads_of(0)  # when the student is validated as it starts
    assert reads_of(9) == before
    assert reads_of(20) == [*before, "tolist", "tolist"]
