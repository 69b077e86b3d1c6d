"""Score the frozen student and the teacher on the test split by one protocol, its shards side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.base import Closed
from pipeline.config.data import Evaluate
from pipeline.config.quant import Quant
from pipeline.models.build import FAMILIES, frozen_student, load_model, read_config, restore_frozen
from pipeline.stages.stage import Step
from pipeline.store.records import Report, Shard, StoredFile, Student, Teacher, Tokens
from pipeline.store.shards import Rows
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.scoring import Scores
from pipeline.tasks.task import Task
from pipeline.tasks.tokenizers import read_tokenizer

VERSION = 1
SPANS_A_WORKER = 4  # so that none waits long for another


def run(step: Step) -> Report:
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    student, student_place = step.input(Student)
    settings = {
        "tokens": tokens_place,
        "tokenizer": tokens.files,
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
    spans = spans_of(tokens.splits["test"].shards, SPANS_A_WORKER * max(1, step.resources.workers))
    scored_by = [student.files[Student.WEIGHTS].sha256, *(teacher.files[name].sha256 for name in sorted(teacher.files))]
    origin = hashlib.sha256(" ".join(scored_by).encode()).hexdigest()[:16]
    pieces = [settings | {"place": step.place, "origin": origin, "shards": span} for span in spans]
    found = step.engine.tasks(_evaluate, pieces, step.place, step.advance, step.resources.gpus_per_worker)
    scored = [Piece.model_validate_json(line) for lines in found for line in lines]
    shape = task_of(tokens.recipe).shape
    return Report(
        **step.identity(),
        protocol=f"{shape}: {step.recipe['protocol']}",
        digest=scored[0].digest,
        student=sum((Scores(**piece.student) for piece in scored), Scores()).metrics(),
        teacher=sum((Scores(**piece.teacher) for piece in scored), Scores()).metrics(),
    )


class Piece(Closed):
    """What one shard of the split gave: of `Scores`, the sums."""

    digest: str
    student: dict[str, Any]
    teacher: dict[str, Any]


Span = tuple[tuple[int, Shard], ...]  # shards in a row, each with the number of rows before it


def spans_of(shards: Sequence[Shard], most: int) -> list[Span]:
    """The shards in at most so many spans of about equal length."""
    before = accumulate((shard.rows for shard in shards), initial=0)
    placed = list(zip(before, shards, strict=False))
    length = -(-len(placed) // most)
    return [tuple(placed[start : start + length]) for start in range(0, len(placed), length)]


def _evaluate(place: StepDir, origin: str, shards: Span, **settings: Any) -> list[str]:
    """A `Piece` of each shard as JSON; those that an earlier attempt left, of the same weights, are not made again."""
    found: dict[str, str] = {}
    scorer = None
    for before, shard in shards:
        name = f"attempt/{origin}-{Path(shard.name).stem}.json"
        try:
            found[name] = place.read(name).decode()
        except FileNotFoundError:
            scorer = scorer or Scorer(**settings)
            found[name] = scorer.score(before, shard).model_dump_json()
            place.write(name, found[name].encode())
    return list(found.values())


class Scorer:
    """The frozen student and its teacher in one process, on a GPU if the worker has one."""

    def __init__(
        self,
        tokens: StepDir,
        tokenizer: dict[str, StoredFile],
        teacher: StepDir,
        teacher_files: dict[str, StoredFile],
        student: StepDir,
        weights: StoredFile,
        family: str,
        quant: Quant,
        batch: int,
        task: Task,
        evaluate: Evaluate,
    ) -> None:
        self.tokens, self.batch, self.task, self.evaluate = tokens, batch, task, evaluate
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = teacher.folder(teacher_files, Teacher.FOLDER)
        frozen = frozen_student(folder, student.local(Student.WEIGHTS, weights), quant, FAMILIES[family])
        self.digest = frozen.digest()
        model = restore_frozen(read_config(folder), quant.spec(), FAMILIES[family], frozen)
        self.student, self.teacher = model.to(device), load_model(folder).to(device).eval()
        self.words = read_tokenizer(tokens.folder(tokenizer, Tokens.FOLDER))

    def score(self, before: int, shard: Shard) -> Piece:
        """A shard of the split; `before`: the split's rows before it."""
        first = self.evaluate.generated_rows  # of the split, those for which the model generates
        left = None if first is None else max(0, first - before)
        evaluate = self.evaluate.model_copy(update={"generated_rows": left})
        rows = batches(Rows(self.tokens, (shard,)), self.batch)
        ours, theirs = self.task.score(rows, self.student, self.teacher, self.words, evaluate)
        return Piece(digest=self.digest, student=asdict(ours), teacher=asdict(theirs))


def batches(rows: Rows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows in order."""
    for start in range(0, rows.rows, batch):
        ids, lengths, _ = rows.get(range(start, min(start + batch, rows.rows)))
        yield ids, lengths
