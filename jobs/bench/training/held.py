"""A store of this process alone, whose steps it fills by hand: training as the product does it, without Ray, MLflow or
a flow, so that a machine that has neither can be measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from pipeline.config.resources import Resources
from pipeline.config.training import Distill, Finetune
from pipeline.errors import ConfigError
from pipeline.models.build import fp32_bytes, parameters
from pipeline.models.device import CPU, this_device
from pipeline.stages.stage import StepJob, training_job, upload_folder
from pipeline.store.records import Shard, Split, SplitName, Teacher, TeacherCache, Tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks.task import Task
from pipeline.training.trainer import TrainingJob

Recipe = Finetune | Distill


class OwnStore(contextlib.ExitStack):
    """Steps that this process holds until it leaves the context."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self._held = folder.resolve(), dict[tuple[str, str], StepDir]()

    def hold(self, stage: str, key: str) -> StepDir:
        """Return the directory of a step, to be written into; one that another process holds is waited for."""
        if (stage, key) not in self._held:
            step_dir = StepDir(str(self.folder / "store"), stage, key, str(self.folder / ".scratch"))
            self._held[stage, key] = self.enter_context(step_dir.hold(True, lambda owner: None))
        return self._held[stage, key]


def identity(step_dir: StepDir, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that every record begins with."""
    return {"key": step_dir.key, "stage_version": 1, "recipe": recipe, "inputs": {}, "provenance": {}}


def tokens_step(
    step_dir: StepDir, task: Task, vocabulary: int, train: list[Shard], held_out: list[Shard]
) -> FinishedStep[Tokens]:
    """Return rows of a language-modelling task as a finished step; validation and test are the same rows."""
    recipe = {"task": task.settings.model_dump(mode="json"), "data": {"unit": "document"}}
    shards: dict[SplitName, list[Shard]] = {"train": train, "validation": held_out, "test": held_out}
    splits = {name: Split(shards=tuple(of_split)) for name, of_split in shards.items()}
    return FinishedStep(
        Tokens(**identity(step_dir, recipe), vocabulary=vocabulary, end_of_text=None, splits=splits), step_dir
    )


def teacher_step(step_dir: StepDir, model: Any, folder: Path) -> FinishedStep[Teacher]:
    """Save a model into `folder`, and return it as a finished step."""
    model.save_pretrained(folder)
    files = upload_folder(step_dir, folder, Teacher.FOLDER)
    trained: dict[str, Any] = {"parameters": parameters(model), "steps": 0, "best_step": 0, "validation_nats": None}
    sizes = {"fp32_bytes": fp32_bytes(model), "hidden": model.config.hidden_size, "family": model.config.model_type}
    return FinishedStep(Teacher(**identity(step_dir, {}), files=files, **trained, **sizes), step_dir)


def job_of(
    store: OwnStore,
    stage: str,
    key: str,
    recipe: Recipe,
    resources: Resources,
    inputs: dict[str, FinishedStep[Any]],
    cached: bool,
) -> TrainingJob:
    """Return a training job of the steps that it reads; with `cached` it takes the teacher's states from one."""
    job = StepJob({}, inputs, store.hold(stage, key), resources, {})
    return training_job(job, recipe, inputs[TeacherCache.stage] if cached else None)


def resources_for(device: torch.device, compiled: bool | None, **given: Any) -> Resources:
    """Return resources by which all is computed on the device; `compiled` as `resources.compile`."""
    return Resources(workers=0, gpus_per_worker=int(device.type == "cuda"), compile=compiled, **given)


def chosen_device(name: str) -> torch.device:
    """Return the device that an option names; auto: the GPU, if there is one. Raises ConfigError for one that is not
    there."""
    if name not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"--device is {name!r}; valid: auto, cuda, cpu")
    device = CPU if name == "cpu" else this_device()
    if name == "cuda" and device.type != "cuda":
        raise ConfigError("--device is 'cuda', and torch sees no GPU here; use auto or cpu")
    return device
