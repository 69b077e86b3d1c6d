"""Score the frozen student and the teacher on the test split by one protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pipeline.config import Quant
from pipeline.families.models import FAMILIES, frozen_student, load_model, read_config, restore_frozen
from pipeline.records import Report, Shard, StoredFile, Student, Teacher, Tokens
from pipeline.schema import Evaluate
from pipeline.step import Step
from pipeline.store import Place
from pipeline.tables import Rows
from pipeline.tasks import task_of
from pipeline.tasks.task import Task
from pipeline.tasks.tokenizers import read_tokenizer

VERSION = 1


def run(step: Step) -> Report:
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    student, student_place = step.input(Student)
    settings = {
        "tokens": tokens_place,
        "tokenizer": tokens.files,
        "shards": tokens.splits["test"].shards,
        "teacher": teacher_place,
        "teacher_files": teacher.files,
        "student": student_place,
        "weights": student.files[Student.WEIGHTS],
        "family": student.family,
        "quant": Quant.model_validate({**student.recipe["quant"], **step.recipe["ship"]}),
        "batch": step.recipe.get("batch", step.resources.inference_batch),
        "task": task_of(tokens.recipe),
        "evaluate": Evaluate.model_validate(step.recipe.get("evaluate", {})),
    }
    found = step.engine.task(_evaluate, settings, step.place)
    shape = task_of(tokens.recipe).shape
    return Report(**step.identity(), protocol=f"{shape}: {step.recipe['protocol']}", **found)


def _evaluate(
    tokens: Place,
    tokenizer: dict[str, StoredFile],
    shards: tuple[Shard, ...],
    teacher: Place,
    teacher_files: dict[str, StoredFile],
    student: Place,
    weights: StoredFile,
    family: str,
    quant: Quant,
    batch: int,
    task: Task,
    evaluate: Evaluate,
) -> dict[str, Any]:
    folder = teacher.folder(teacher_files, Teacher.FOLDER)
    frozen = frozen_student(folder, student.local(Student.WEIGHTS, weights), quant, FAMILIES[family])
    model = restore_frozen(read_config(folder), quant.spec(), FAMILIES[family], frozen)
    words = read_tokenizer(tokens.folder(tokenizer, Tokens.FOLDER))
    rows = batches(Rows(tokens, shards), batch)
    ours, theirs = task.score(rows, model, load_model(folder).eval(), words, evaluate)
    return {"digest": frozen.digest(), "student": ours, "teacher": theirs}


def batches(rows: Rows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows in order."""
    for start in range(0, rows.rows, batch):
        ids, lengths, _ = rows.get(range(start, min(start + batch, rows.rows)))
        yield ids, lengths
