"""What each module costs at each width: KL(teacher || teacher with one module quantized), before any training.

A keyed step beside the line of seven: it reads tokens, teacher and cache, and its numbers are kept in its record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.distill.losses import logit_distillation_loss
from pipeline.models.build import FAMILIES, load_model, make_student
from pipeline.models.hidden_states import head_of, last_states, logits_of
from pipeline.quant.layers import quantizers
from pipeline.quant.spec import TAKES, UNQUANTIZED, BitWidths, QuantSpec
from pipeline.stages.stage import Step
from pipeline.store.records import Sensitivity, Shard, StoredFile, Teacher, TeacherCache, Tokens
from pipeline.store.shards import Rows
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.task import Batch, Task

VERSION = 1
SHARDS = 4  # of the cache that are read


def run(step: Step) -> Sensitivity:
    """The recipe has the quantizer, its granularity, the widths, and how many of the training rows are looked at."""
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    cache, cache_place = step.input(TeacherCache)
    settings = {
        "tokens": tokens_place,
        "shards": tokens.splits["train"].shards,
        "cache": cache_place if cache.mode == "states" else None,
        "task": task_of(tokens.recipe),
        "teacher": teacher_place,
        "files": teacher.files,
        "family": teacher.family,
        "specs": {width: alone(step.recipe, width) for width in step.recipe["widths"]},
        "rows": step.recipe["rows"],
        "batch": step.resources.inference_batch,
    }
    counted, kl_nats = step.engine.task(_measure, settings, step.place)
    return Sensitivity(**step.identity(), tokens=counted, kl_nats=kl_nats)


@torch.no_grad()
def _measure(
    tokens: StepDir,
    shards: tuple[Shard, ...],
    cache: StepDir | None,
    task: Task,
    teacher: StepDir,
    files: dict[str, StoredFile],
    family: str,
    specs: dict[int, QuantSpec],
    rows: int,
    batch: int,
) -> tuple[int, dict[str, dict[int, float]]]:
    """Valid tokens looked at, and nats per token. In memory are the chosen rows with their states, two models, and
    the logits of one batch."""
    folder = teacher.folder(files, Teacher.FOLDER)
    original = load_model(folder).eval()
    looked_at = list(_batches(tokens, shards, cache, task, rows, batch, original))
    counted = sum(int(piece.distilled.sum()) for piece, _ in looked_at)
    found: dict[str, dict[int, float]] = {}
    for width, spec in specs.items():
        student = load_model(folder)
        make_student(student, spec, FAMILIES[family])
        student.eval()
        modules = {name: (student.get_submodule(name), quantizer) for name, _, quantizer in quantizers(student)}
        for module, _ in modules.values():
            module.quantizer = None
        for name, (module, quantizer) in modules.items():
            module.quantizer = quantizer
            nats = sum(_divergence(piece, states, original, student) for piece, states in looked_at)
            module.quantizer = None
            found.setdefault(name, {})[width] = max(0.0, nats / counted)
    return counted, found


def alone(recipe: dict[str, Any], width: int) -> QuantSpec:
    """Weights at one width, started at the least squared error where the quantizer can; activations as they are."""
    quantizer = recipe["quantizer"]
    return QuantSpec(
        BitWidths(width, width, UNQUANTIZED),
        quantizer=quantizer,
        granularity=recipe["granularity"],
        gamma_init="mse" if quantizer in TAKES["gamma_init"] else "auto",
    )


def _batches(
    tokens: StepDir,
    shards: tuple[Shard, ...],
    cache: StepDir | None,
    task: Task,
    rows: int,
    batch: int,
    teacher: PreTrainedModel,
) -> Iterator[tuple[Batch, Tensor]]:
    """Rows at equal distances in a few shards at equal distances, with the teacher's last states."""
    some = [shards[i] for i in _spread(len(shards), SHARDS)]
    reader = Rows(tokens, some, cache)
    for ids in torch.tensor(_spread(reader.rows, rows)).split(batch):
        stored, lengths, cached = reader.get(ids.tolist())
        piece = task.batch(stored, lengths)
        states = last_states(teacher, *piece.inputs) if cached is None else cached.reshape(*piece.ids.shape, -1)
        yield piece, states


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, at equal distances."""
    chosen = min(count, most)
    return [i * count // chosen for i in range(chosen)]


def _divergence(batch: Batch, states: Tensor, teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """KL(teacher || student) in nats, summed over valid tokens."""
    head: Any = head_of(teacher)
    exact = head(states)
    logits = logits_of(student, last_states(student, *batch.inputs))
    cross, _ = logit_distillation_loss(logits, exact, batch.distilled)
    entropy, _ = logit_distillation_loss(exact, exact, batch.distilled)
    return float(cross - entropy)
