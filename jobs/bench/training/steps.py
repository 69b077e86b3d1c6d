"""The steps that `bench train` compares: plain transformers', and those of the product's own trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench.training.held import OwnStore, identity, job_of, resources_for, teacher_step, tokens_step
from jobs.bench.training.measures import Take, seconds_a_step
from pipeline.config.data import TaskSettings
from pipeline.config.presets import PRESETS, PresetName
from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.models.build import build, load_model, parameters, read_config, set_dropout
from pipeline.models.hidden_states import WithStates
from pipeline.stages import distill as distill_stage
from pipeline.stages.cache import CacheShard
from pipeline.stages.kept import KeptStates
from pipeline.stages.stage import StepJob
from pipeline.store.records import Shard, Teacher, TeacherCache, Tokens
from pipeline.store.shards import rows_per_shard, store_shard, write_tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.training.trainer import Trainer

BITS = "2-2-8"
SHARDS = 9  # of training rows, of which the first warms the cache up
STEPS = 100_000  # that a recipe is made for: more than are taken, so that no schedule ends
FADED_IN = 0.0  # weights are quantized from the first step on, as they are in most steps of a run
CACHE_DTYPE = "float16"
MICRO = 4  # parts of a batch, where it is taken in parts


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and the batches that it is trained on."""

    layers: int
    width: int
    heads: int
    vocab: int
    length: int
    batch: int
    micro_batch: int

    @property
    def tokens(self) -> int:
        """Count the tokens of a batch."""
        return self.batch * self.length

    def source(self) -> dict[str, Any]:
        """Return the architecture, as `model.source` takes it."""
        heads = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads}
        return {"architecture": "gpt2", **heads, "n_positions": self.length, "vocab_size": self.vocab}


@dataclass(frozen=True)
class Case:
    """A step that can be taken, what of it is its optimizer's, and the trainer that takes it, unless it is plain
    transformers'."""

    take: Take
    optimize: Take
    trainer: Trainer | None = None


def _of_trainer(trainer: Trainer) -> Case:
    return Case(trainer.train_step, lambda step: trainer.optimizers.step(step, STEPS), trainer)


class Steps:
    """Random rows, a teacher with random weights, and every row of the table made from them."""

    def __init__(self, store: OwnStore, shape: Shape, device: torch.device, compiled: bool | None) -> None:
        self.store, self.shape, self.device, self.compiled = store, shape, device, compiled
        self.task = LanguageModeling(TaskSettings(block_length=shape.length))
        step_dir, random = store.hold(Tokens.stage, "0" * 32), np.random.default_rng(0)
        most = rows_per_shard(shape.length) if device.type == "cuda" else 2 * shape.batch  # which a CPU is long at
        per_shard, shards = max(shape.batch, most), []
        for number in range(SHARDS + 1):
            ids = random.integers(shape.vocab, size=(per_shard, shape.length)).astype(np.int32)
            lengths = np.full(per_shard, shape.length, np.int32)
            write = partial(write_tokens, ids=ids, lengths=lengths)
            shards.append(store_shard(step_dir, f"rows/train-{number}.parquet", per_shard, ids.size, write))
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        self.tokens = tokens_step(step_dir, self.task, shape.vocab, shards[:-1], shards[-1:])
        model = build(read_config(shape.source()), seed=0)
        self.parameters = parameters(model)
        self.teacher = teacher_step(store.hold(Teacher.stage, "0" * 32), model, store.folder / "teacher")
        self.inputs: dict[str, FinishedStep[Any]] = {Tokens.stage: self.tokens, Teacher.stage: self.teacher}
        self._made = 0

    @property
    def precision(self) -> str:
        """Return what a step computes its products in."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def fill_cache(self) -> dict[str, float]:
        """Cache the teacher's states of all training rows; return tokens a second, the first shard left out, and those
        of the bare forward pass in what the device is fast at."""
        resources = resources_for(self.device, self.compiled, inference_batch=self.shape.batch)
        step_dir = self.store.hold(TeacherCache.stage, "0" * 32)
        worker = CacheShard(StepJob({}, self.inputs, step_dir, resources, {}), KeptStates(CACHE_DTYPE))
        train = self.tokens.record.splits["train"].shards
        lines: list[str] = []

        def fill(number: int) -> None:
            lines.append(worker(train[number]))

        fill(0)
        timed = SHARDS - 1
        each = seconds_a_step(fill, 1, timed, self.device)
        cached = tuple(Shard.model_validate_json(line) for line in lines)
        fields: dict[str, Any] = {"mode": "states", "dtype": CACHE_DTYPE, "hidden": self.shape.width, "shards": cached}
        self.inputs[TeacherCache.stage] = FinishedStep(TeacherCache(**identity(step_dir, {}), **fields), step_dir)
        bare = self._bare_forward()
        rates = {"cache": train[0].tokens / each, "forward": self.shape.tokens / bare}
        return {f"{name}_tokens_per_s": rate for name, rate in rates.items()} | {"forward_ms": 1e3 * bare}

    def _bare_forward(self) -> float:
        """Return the seconds of a forward pass of the teacher, without its head, over a batch."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model: Any = load_model(self.teacher.folder()).to(self.device, dtype).eval()

        @torch.no_grad()
        def forward(step: int) -> None:
            model.base_model(input_ids=self.batch(step), use_cache=False)

        forward(0)
        return min(seconds_a_step(forward, step, 2, self.device) for step in range(3))

    def batch(self, step: int) -> Tensor:
        """Return ids (batch, length) on the device."""
        return self.ids[torch.arange(step * self.shape.batch, (step + 1) * self.shape.batch) % len(self.ids)]

    def plain(self, compiled: bool = False, loss_too: bool = False, parts: int = 1) -> Case:
        """Return transformers' step: cross-entropy, clipping, fused AdamW, no dropout."""
        model = load_model(self.teacher.folder()).to(self.device).train()
        set_dropout(model, 0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def logits_of(ids: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits: Tensor = forward(input_ids=ids, use_cache=False).logits
            return logits

        def loss_of(ids: Tensor) -> Tensor:
            predicted = logits_of(ids)[:, :-1].float().flatten(0, 1)
            return F.cross_entropy(predicted, ids[:, 1:].flatten())

        forward: Any = torch.compile(model) if compiled and not loss_too else model
        loss: Callable[[Tensor], Tensor] = torch.compile(loss_of) if loss_too else loss_of

        def take(step: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            for ids in self.batch(step).chunk(parts):
                (loss(ids) / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return Case(take, lambda step: optimizer.step())

    def finetune(self) -> Case:
        """Return a step of full-precision training."""
        fields = {"steps": STEPS, "batch_size": self.shape.batch, "precision": self.precision, "dropout": 0.0}
        model = load_model(self.teacher.folder())
        set_dropout(model, 0.0)
        trainer = Trainer(
            WithStates(model), self._job(Finetune.model_validate(fields), False, 1), None, self.device, _silent
        )
        return _of_trainer(trainer)

    def distill(self, preset: PresetName, bits: str = BITS, cached: bool = True, parts: int = 1, **own: Any) -> Case:
        """Return a step of distillation by a preset's recipe, with values of its own laid over it."""
        sections = PRESETS[preset]
        fields = {"steps": STEPS, "batch_size": self.shape.batch, "precision": self.precision}
        recipe = Distill.model_validate({**fields, **sections["distill"], "fade_in": FADED_IN, **own})
        quant = Quant.model_validate({**sections["quant"], "bits": bits})
        job = self._job(recipe, cached, parts)
        family = self.teacher.record.family
        student, distillation = distill_stage.make(job, self.teacher.folder(), family, quant, self.device)
        trainer = Trainer(student, job, distillation, self.device, _silent)
        return _of_trainer(trainer)

    def _job(self, recipe: Distill | Finetune, cached: bool, parts: int) -> Any:
        self._made += 1
        integers = isinstance(recipe, Distill) and recipe.products == "int8"  # which nothing compiled has
        resources = resources_for(
            self.device,
            False if integers else self.compiled,
            micro_batch=max(1, self.shape.micro_batch // parts),
            inference_batch=self.shape.batch,
        )
        stage = "distill" if isinstance(recipe, Distill) else "finetune"
        return job_of(self.store, stage, f"{self._made:032d}", recipe, resources, self.inputs, cached)


def _silent(done: int, total: int, note: str, points: Any = ()) -> None:
    """Report nothing."""


PLAIN, COMPILED = "transformers", "transformers, compiled"
CACHED, ONLINE, NO_CONTRAST = "paper, cached", "paper, online", "2-2-8 without contrast"
IN_PARTS = "paper, micro_batch a quarter"
BEST_CACHED, BEST_ONLINE = "best, cached", "best, online"
INT8 = "best, cached, int8 products"
ROWS: dict[str, Callable[[Steps], Case]] = {  # the first are those that floors are of, lest a time limit cuts them off
    PLAIN: lambda steps: steps.plain(),
    COMPILED: lambda steps: steps.plain(compiled=True),
    CACHED: lambda steps: steps.distill("paper"),
    IN_PARTS: lambda steps: steps.distill("paper", parts=MICRO),
    ONLINE: lambda steps: steps.distill("paper", cached=False),
    BEST_CACHED: lambda steps: steps.distill("best"),
    BEST_ONLINE: lambda steps: steps.distill("best", cached=False),
    INT8: lambda steps: steps.distill("best", products="int8"),
    NO_CONTRAST: lambda steps: steps.distill("paper", contrast_weight=0.0),
    "weights only": lambda steps: steps.distill("paper", "2-2-32", contrast_weight=0.0),
    "nothing quantized, cached": lambda steps: steps.distill("paper", "32-32-32", contrast_weight=0.0),
    "finetune": lambda steps: steps.finetune(),
    "transformers, compiled with its loss": lambda steps: steps.plain(compiled=True, loss_too=True),
    "transformers, micro_batch a quarter": lambda steps: steps.plain(parts=MICRO),
}
