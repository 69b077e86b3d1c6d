"""What each module costs at each width: KL(teacher || teacher with one module quantized), before any training.

A keyed step beside the line: it reads tokens, teacher and cache, and its numbers are kept in its record.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.distill.losses import logit_distillation_loss
from pipeline.models.build import load_model
from pipeline.models.device import device_for
from pipeline.models.family import family_named
from pipeline.models.hidden_states import head_of, last_states, logits_of
from pipeline.models.student import make_student
from pipeline.quant.granularity import Granularity
from pipeline.quant.modules import quantizers
from pipeline.quant.spec import TAKES, UNQUANTIZED, BitWidths, QuantSpec
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.keys import recipe_of
from pipeline.store.records import Sensitivity, Teacher, TeacherCache, Tokens
from pipeline.store.shards import Rows, drawn_shards
from pipeline.tasks.batch import Batch

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedModel

SHARDS = 4  # of the cache that are read
ROWS = 32
WIDTHS = (2, 4, 8)


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return the quantizer, its granularity, the widths, and how many of the training rows are looked at."""
    quant = recipe_of(run.config.quant)
    return {"widths": list(WIDTHS), "rows": ROWS, **{name: quant[name] for name in ("quantizer", "granularity")}}


def run(step: Step) -> Sensitivity:
    """Measure every module at every width, as one task."""
    tokens, kl_nats = step.engine.task(partial(_measure, step.job), step.dir, step.resources.gpus_per_worker)
    return Sensitivity(**step.identity(), tokens=tokens, kl_nats=kl_nats)


STAGE = Stage(Sensitivity, always(Tokens, Teacher, TeacherCache), recipe, run, version=3)


@torch.no_grad()
def _measure(job: StepJob) -> tuple[int, dict[str, dict[int, float]]]:
    """Return the valid tokens looked at, and nats per token. In memory are the chosen rows with their states, two
    models, and the logits of one batch."""
    teacher = job.input(Teacher)
    folder, family = teacher.folder(), family_named(teacher.record.family)
    device = device_for(job.resources)
    original = load_model(folder).to(device).eval()
    pieces = list(_batches(job, original, device))
    tokens = sum(int(batch.distilled.sum()) for batch, _ in pieces)
    kl_nats: dict[str, dict[int, float]] = {}
    for width in job.recipe["widths"]:
        student = load_model(folder)
        make_student(student, alone(job.recipe, width), family)
        student.to(device).eval()
        modules = {name: (student.get_submodule(name), quantizer) for name, _, quantizer in quantizers(student)}
        for module, _ in modules.values():
            module.quantizer = None
        for name, (module, quantizer) in modules.items():
            module.quantizer = quantizer
            nats = sum(_divergence(batch, states, original, student) for batch, states in pieces)
            module.quantizer = None
            kl_nats.setdefault(name, {})[width] = max(0.0, nats / tokens)
    return tokens, kl_nats


def alone(recipe: dict[str, Any], width: int) -> QuantSpec:
    """Return weights at one width, started at the least squared error where the quantizer can; activations as they
    are."""
    quantizer = recipe["quantizer"]
    return QuantSpec(
        BitWidths(width, width, UNQUANTIZED),
        quantizer=quantizer,
        granularity=Granularity.parse(recipe["granularity"]),
        gamma_init="mse" if quantizer in TAKES["gamma_init"] else "auto",
    )


def _batches(job: StepJob, teacher: PreTrainedModel, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """Yield a few rows of a few shards, drawn by hash, with the teacher's last states."""
    tokens, cache, task = job.input(Tokens), job.input(TeacherCache), job.task
    shards = drawn_shards(tokens.record.splits["train"].shards, SHARDS)
    reader = Rows(tokens.dir, shards, cache if cache.record.mode == "states" else None)
    for ids in torch.tensor(reader.drawn(job.recipe["rows"])).split(job.resources.inference_batch):
        stored, lengths, cached = reader.get(ids.tolist())
        batch = task.batch(stored, lengths).to(device)
        if cached is None:
            yield batch, last_states(teacher, *batch.inputs)
        else:
            yield batch, cached.to(device).wide().reshape(*batch.ids.shape, -1)


def _divergence(batch: Batch, states: Tensor, teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Return KL(teacher || student) in nats, summed over valid tokens."""
    head: Any = head_of(teacher)
    exact = head(states)
    logits = logits_of(student, last_states(student, *batch.inputs))
    cross, _ = logit_distillation_loss(logits, exact, batch.distilled)
    entropy, _ = logit_distillation_loss(exact, exact, batch.distilled)
    return float(cross - entropy)
