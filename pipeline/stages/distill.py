"""The student: the teacher's copy, quantized, trained to give the teacher's distributions and representations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.distill.memory_bank import MemoryBank
from pipeline.models.build import FAMILIES, load_model, make_student, set_dropout
from pipeline.models.hidden_states import WithStates, head_of, layer_states
from pipeline.stages.stage import Step
from pipeline.store.records import Advance, StoredFile, Student, Teacher, TeacherCache, Tokens
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.training.checkpoints import finish, store_tensors, weights
from pipeline.training.diagnostics import weight_histograms
from pipeline.training.distillation import Distillation
from pipeline.training.trainer import Run, fit

VERSION = 5


def run(step: Step) -> Student:
    step.engine.train(_train, settings_of(step), step.place, step.advance)
    teacher, _ = step.input(Teacher)
    result = json.loads(step.place.read("attempt/result.json"))
    return Student(**step.identity(), family=teacher.family, parameters=teacher.parameters, **result)


def settings_of(step: Step) -> dict[str, Any]:
    """What every worker is told."""
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    cache, cache_place = step.input(TeacherCache)
    run = Run(
        recipe=Distill.model_validate(step.recipe["distill"]),
        place=step.place,
        tokens=tokens_place,
        train=tokens.splits["train"].shards,
        validation=tokens.splits["validation"].shards,
        resources=step.resources,
        cache=cache_place if cache.mode == "states" else None,
        task=task_of(tokens.recipe),
    )
    quant = Quant.model_validate(step.recipe["quant"])
    return {"run": run, "teacher": teacher_place, "files": teacher.files, "family": teacher.family, "quant": quant}


def _train(
    run: Run,
    teacher: StepDir,
    files: dict[str, StoredFile],
    family: str,
    quant: Quant,
    device: torch.device,
    report: Advance,
) -> None:
    student, distillation = make(run, teacher.folder(files, Teacher.FOLDER), family, quant, device)
    progress = fit(student, run, distillation, device, report)
    if progress is not None:
        stored = store_tensors(run.place, Student.WEIGHTS, weights(student))
        histograms = run.place.write("histograms.json", json.dumps(weight_histograms(student.model)).encode())
        finish(run.place, progress, run.steps, {Student.WEIGHTS: stored, "histograms.json": histograms})


def make(run: Run, folder: Path, family: str, quant: Quant, device: torch.device) -> tuple[WithStates, Distillation]:
    """The student, started from the teacher's weights, and what it is distilled from."""
    recipe = run.recipe
    if not isinstance(recipe, Distill):
        raise TypeError("distillation needs a Distill recipe")
    teacher = load_model(folder).requires_grad_(False).to(device).eval()
    student = load_model(folder)
    set_dropout(student, 0.0)  # cached states have none
    make_student(student, quant.spec(), FAMILIES[family])
    hidden, vocabulary = teacher.config.hidden_size, teacher.config.vocab_size

    def states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return layer_states(teacher, recipe.compared_layer, *inputs)

    head = head_of(teacher) if run.cache is None else copy.deepcopy(head_of(teacher))
    distillation = Distillation(
        recipe=recipe,
        head=head,
        teacher=states if run.cache is None else None,
        bank=MemoryBank(vocabulary, hidden, recipe.momentum, device),
    )
    return WithStates(student, recipe.compared_layer), distillation
