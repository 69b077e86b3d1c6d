"""Score the frozen student and the teacher on the test split by one protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pipeline.config import Quant
from pipeline.families.models import FAMILIES, frozen_student, load_model, read_config, restore_frozen
from pipeline.records import Report, Shard, StoredFile, Student, Teacher, Tokens
from pipeline.step import Step
from pipeline.store import Place
from pipeline.tables import Rows
from pipeline.tasks.language_modeling import score
from pipeline.tasks.tokenizers import read_tokenizer, token_bytes

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
    }
    found = step.engine.task(_evaluate, settings, step.place)
    return Report(**step.identity(), protocol=f"block length {tokens.block_length}: {step.recipe['protocol']}", **found)


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
) -> dict[str, Any]:
    folder = teacher.folder(teacher_files, Teacher.FOLDER)
    frozen = frozen_student(folder, student.local(Student.WEIGHTS, weights), quant, FAMILIES[family])
    model = restore_frozen(read_config(folder), quant.spec(), FAMILIES[family], frozen)
    bytes_of = token_bytes(read_tokenizer(tokens.folder(tokenizer, Tokens.FOLDER)))
    scores, reference = score(batches(Rows(tokens, shards), batch), model, bytes_of, load_model(folder).eval())
    if reference is None:
        raise TypeError("a teacher was given and not scored")
    return {"digest": frozen.digest(), "student": scores.metrics(), "teacher": reference.metrics()}


def batches(rows: Rows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows in order."""
    for start in range(0, rows.rows, batch):
        ids, lengths, _ = rows.get(range(start, min(start + batch, rows.rows)))
        yield ids, lengths
