"""Score the frozen student and the teacher on the test and validation splits by one protocol.

`documents.json` holds the sums of next-token nats of each document of the test split, in its order: {"tokens": [...],
"teacher": [...], "student": [...]}; where the task measures rows, `rows.json` has what it measured of each, by metric:
{"teacher": {"accuracy": [...]}, "student": {...}}.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from pipeline.config.quant import Quant
from pipeline.models.build import read_config
from pipeline.models.family import family_named
from pipeline.models.student import load_frozen, restore_frozen
from pipeline.stages.scorer import score_splits, scoring_recipe
from pipeline.stages.stage import Stage, Step, StepJob, always
from pipeline.store.records import Evaluation, SplitName, Student, Teacher, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = "samples.txt"
SCORED: tuple[SplitName, ...] = ("test", "validation")


def run(step: Step) -> Evaluation:
    """Score every shard of both splits, and let the student write a few rows of the validation split."""
    files, digest = step.input(Teacher).record.files, step.input(Student).record.digest
    scored_by = [digest, *(files[name].sha256 for name in sorted(files))]
    scored = score_splits(step, hashlib.sha256(" ".join(scored_by).encode()).hexdigest()[:16], student_of, SCORED)
    test, reference = scored.student["test"], scored.teacher["test"]
    documents = {"tokens": test.tokens, "teacher": reference.nats, "student": test.nats}
    kept = {
        SAMPLES: step.dir.write(SAMPLES, scored.samples.encode()),
        Evaluation.DOCUMENTS: step.dir.write(Evaluation.DOCUMENTS, json.dumps(documents).encode()),
    }
    if test.of_rows:
        rows = {"teacher": reference.of_rows, "student": test.of_rows}
        kept[Evaluation.ROWS] = step.dir.write(Evaluation.ROWS, json.dumps(rows).encode())
    return Evaluation(
        **step.identity(),
        files=kept,
        protocol=f"{step.task.shape}: {step.recipe['protocol']}",
        digest=digest,
        student=test.metrics(),
        teacher=reference.metrics(),
        validation={
            "teacher": scored.teacher["validation"].metrics(),
            "student": scored.student["validation"].metrics(),
        },
    )


STAGE = Stage(Evaluation, always(Tokens, Teacher, Student), scoring_recipe, run, version=3, unit="parts")


def student_of(job: StepJob) -> PreTrainedModel:
    """Return the frozen student of a job, as it ships."""
    student = job.input(Student)
    spec = Quant.model_validate(student.record.recipe["quant"]).spec()
    family, frozen = family_named(student.record.family), load_frozen(student.local(Student.FROZEN))
    return restore_frozen(read_config(job.input(Teacher).folder()), spec, family, frozen)
