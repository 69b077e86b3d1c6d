"""Score the frozen student and the teacher on the test and validation splits by one protocol.

`documents.json` holds the sums of next-token nats of each document of the test split, in its order: {"tokens": [...],
"teacher": [...], "student": [...]}; where the task measures rows, `rows.json` has what it measured of each, by metric:
{"teacher": {"accuracy": [...]}, "student": {...}}. `suites.json` has each of `evaluate.suites`: {"generated":
{"split": "validation", "student": {metric: value}, "teacher": {...}, "tables": {"position": [{"band", "tokens", ...},
...], ...}}, ...}; their metrics are beside the others of that split.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError
from pipeline.metrics import LM_EVAL, metric_of
from pipeline.models.build import load_model, read_config
from pipeline.models.device import device_for
from pipeline.models.family import family_named
from pipeline.models.student import load_frozen, restore_frozen
from pipeline.sources.content import ContentMemo
from pipeline.stages.scorer import score_splits, scoring_recipe
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.locations import make_scratch_dir
from pipeline.store.records import BothMetrics, Evaluation, SplitName, Student, Teacher, Tokens
from pipeline.store.shards import Rows, drawn_shards, open_shard, read_tokens
from pipeline.suites import generated, lm_eval_tasks
from pipeline.tasks.tokenizers import read_tokenizer

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
    metrics: dict[str, BothMetrics] = {
        split: {"teacher": scored.teacher[split].metrics(), "student": scored.student[split].metrics()}
        for split in SCORED
    }
    documents = {"tokens": test.tokens, "teacher": reference.nats, "student": test.nats}
    kept = {
        SAMPLES: step.dir.write(SAMPLES, scored.samples.encode()),
        Evaluation.DOCUMENTS: step.dir.write(Evaluation.DOCUMENTS, json.dumps(documents).encode()),
    }
    if test.of_rows:
        rows = {"teacher": reference.of_rows, "student": test.of_rows}
        kept[Evaluation.ROWS] = step.dir.write(Evaluation.ROWS, json.dumps(rows).encode())
    if wanted := step.recipe.get("suites"):
        gpus = step.resources.gpus_per_worker
        suites = {name: step.engine.task(partial(measured, step.job, name), step.dir, gpus) for name in wanted}
        kept[Evaluation.SUITES] = step.dir.write(Evaluation.SUITES, json.dumps(suites).encode())
        for suite in suites.values():
            for who, of_split in metrics[suite["split"]].items():
                of_split |= suite[who]
    return Evaluation(
        **step.identity(),
        files=kept,
        protocol=f"{step.task.shape}: {step.recipe['protocol']}",
        digest=digest,
        student=metrics["test"]["student"],
        teacher=metrics["test"]["teacher"],
        validation=metrics["validation"],
    )


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return how scores are taken, and of each suite what its numbers depend on. Raises ConfigError as `pinned`, and
    for a bound of a gate on what no task of lm-eval measures on its validation split."""
    suites = {name: pinned(name, run) for name in run.config.evaluate.suites}
    asked = {"validation": dict[str, str](), "test": dict[str, str]()}
    for suite, depends in suites.items():
        asked[depends.get("split", generated.SPLIT)] |= dict.fromkeys(depends.get("metrics", ()), suite)
    for knob, metric in run.config.bounds:
        known = metric_of(metric)
        if known is None or known.suite != LM_EVAL or metric in asked["validation"]:
            continue
        why = f" of the test split of {asked['test'][metric]}, which is shown only" if metric in asked["test"] else ""
        raise ConfigError(
            f"{knob} names {metric!r}{why}; what tasks of lm-eval measure on validation here: "
            f"{', '.join(asked['validation']) or 'nothing'}."
        )
    return scoring_recipe(run) | ({"suites": suites} if suites else {})


def told_of_suites(recipe: dict[str, Any]) -> list[str]:
    """Return which suites of a recipe choose nothing."""
    return [
        f"evaluate.suites: {suite} has no validation split and is asked on its test split, which is shown only: lookup "
        "and gates cannot use it."
        for suite, depends in recipe.get("suites", {}).items()
        if depends.get("split") == "test"
    ]


def pinned(suite: str, run: PinnedRun) -> dict[str, Any]:
    """Return what a suite's numbers depend on. Raises ConfigError: a task of lm-eval that cannot be run here."""
    if suite == generated.NAME:
        return generated.recipe()
    words, memo = None, ContentMemo(make_scratch_dir(run.config.resources))
    if run.task.templated and run.tokenizer is not None:
        words = read_tokenizer(run.tokenizer.folder, run.tokenizer.gguf_file)
    return lm_eval_tasks.recipe(suite.partition(":")[2], run.family.encoder_decoder, memo, words)


def measured(job: StepJob, suite: str) -> dict[str, Any]:
    """Return what a suite measures of a job's student and teacher."""
    device, tokens, at_once = device_for(job.resources), job.input(Tokens), job.resources.inference_batch
    student = student_of(job).to(device).eval()
    teacher = load_model(job.input(Teacher).folder()).to(device).eval()
    if suite != generated.NAME:
        models = {"student": student, "teacher": teacher}
        task, depends = suite.partition(":")[2], job.recipe["suites"][suite]
        return lm_eval_tasks.measure(task, depends, models, tokens.folder(), at_once)
    rows = Rows(tokens.dir, tokens.record.splits[generated.SPLIT].shards)
    ids, lengths, _ = rows.get(rows.drawn(generated.PROMPTS))
    shards = drawn_shards(tokens.record.splits["train"].shards, generated.COUNTED_SHARDS)
    read = (pair for shard in shards for pair in zip(*read_tokens(open_shard(tokens.dir, shard)), strict=True))
    documents = (document for row, length in read for document in job.task.documents_in(row, length))
    counts = generated.count_tokens(documents, int(teacher.config.vocab_size))
    batch = job.task.batch(ids, lengths).references()
    return generated.measure(student, teacher, job.task, batch, counts, at_once)


STAGE = Stage(Evaluation, always(Tokens, Teacher, Student), recipe, run, version=4, unit="parts")


def student_of(job: StepJob) -> PreTrainedModel:
    """Return the frozen student of a job, as it ships."""
    student = job.input(Student)
    spec = Quant.model_validate(student.record.recipe["quant"]).spec()
    family, frozen = family_named(student.record.family), load_frozen(student.local(Student.FROZEN))
    return restore_frozen(read_config(job.input(Teacher).folder()), spec, family, frozen)
