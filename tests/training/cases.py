"""A small training run that tests drive with any number of workers: forked processes over gloo, no Ray."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.training import Distill, Finetune
from pipeline.models.build import build, load_model, read_config, set_dropout
from pipeline.models.hidden_states import WithStates
from pipeline.stages import distill as distill_stage
from pipeline.stages.cache import CacheShard
from pipeline.stages.kept import Kept, KeptDraws, KeptStates
from pipeline.stages.stage import StepJob, upload_folder
from pipeline.store.lease import Owner
from pipeline.store.pieces import Pieces
from pipeline.store.records import Shard, Split, Teacher, TeacherCache, Tokens
from pipeline.store.shards import store_shard, write_tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.task import Task
from pipeline.training.distillation import Distillation
from pipeline.training.trainer import Trainer, TrainingJob

VOCABULARY, WIDTH, HIDDEN = 64, 16, 32
ORIGIN: dict[str, Any] = {"key": "", "stage_version": 1, "inputs": {}, "provenance": {}}
CPU = torch.device("cpu")
ARCHITECTURE = {
    "architecture": "gpt2",
    "n_layer": 2,
    "n_embd": HIDDEN,
    "n_head": 2,
    "n_positions": WIDTH,
    "vocab_size": VOCABULARY,
}


def fenced(root: Path, stage: str, key: str = "0" * 32) -> StepDir:
    """A step's directory whose lease this process holds until it ends."""
    step_dir = StepDir(str(root / "store"), stage, key, str(root / "scratch"))
    with step_dir.hold(False, lambda owner: None) as held:
        pass
    owner = json.dumps(vars(Owner.this_process()))
    lease = f'{{"owner": {owner}, "fence": {held.fence}, "heartbeat": ""}}'
    (root / "store" / stage / key / "lease.json").write_text(lease)
    return held


@dataclass
class Case:
    """Tokens of a noisy successor rule, a teacher's folder, and what a run needs."""

    root: Path
    tokens: StepDir
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    teacher: Path
    runs: int = 0
    task: Task = field(default_factory=LanguageModeling)
    family: str = "gpt2"

    @classmethod
    def of(cls, root: Path, task: Task, model: dict[str, Any], ids: np.ndarray, lengths: np.ndarray) -> Case:
        """Rows of a task, 20 a shard, the last shard for validation, and a teacher with random weights."""
        tokens, shards = fenced(root, "tokenize"), []
        for number, start in enumerate(range(0, len(ids), 20)):
            rows, valid = ids[start : start + 20], lengths[start : start + 20]
            write = partial(write_tokens, ids=rows, lengths=valid)
            shards.append(store_shard(tokens, f"rows/train-{number}.parquet", 20, task.tokens(valid), write))
        teacher = root / "teacher"
        build(read_config(model), seed=0).save_pretrained(teacher)
        family = model["architecture"]
        return cls(root, tokens, tuple(shards[:-1]), tuple(shards[-1:]), teacher, task=task, family=family)

    @classmethod
    def make(cls, root: Path) -> Case:
        random = np.random.default_rng(0)
        ids = np.empty((120, WIDTH), np.int32)
        ids[:, 0] = random.integers(VOCABULARY, size=120)
        for column in range(1, WIDTH):
            noise = random.integers(VOCABULARY, size=120)
            ids[:, column] = np.where(random.random(120) < 0.2, noise, (3 * ids[:, column - 1] + 1) % VOCABULARY)
        lengths = np.full(120, WIDTH, np.int32)
        lengths[39] = 5  # the last row of a part may be padded
        return cls.of(root, LanguageModeling(), ARCHITECTURE, ids, lengths)

    def cache(self, dtype: str) -> FinishedStep[TeacherCache]:
        """The teacher's states of all training rows."""
        return self._cache("states", KeptStates(dtype))

    def draws(self, count: int = 50) -> FinishedStep[TeacherCache]:
        """Tokens drawn from the teacher at all positions of all training rows."""
        return self._cache("logits", KeptDraws("uint8", count))

    def _cache(self, mode: Any, kept: Kept) -> FinishedStep[TeacherCache]:
        self.runs += 1
        step_dir = fenced(self.root, "cache", f"{kept.dtype}-{self.runs}")
        worker = CacheShard.__new__(CacheShard)
        worker.dir, worker.tokens, worker.task, worker.kept, worker.batch = step_dir, self.tokens, self.task, kept, 7
        worker.device, worker.model = torch.device("cpu"), load_model(self.teacher).eval()
        worker.made = Pieces(step_dir, "parts/")
        shards = [Shard.model_validate_json(worker(shard)) for shard in self.train]
        record = TeacherCache(**ORIGIN, recipe={}, mode=mode, dtype=kept.dtype, hidden=HIDDEN, shards=tuple(shards))
        return FinishedStep(record, step_dir)

    def step_job(
        self,
        recipe: dict[str, Any],
        train: tuple[Shard, ...] | None = None,
        cache: FinishedStep[TeacherCache] | None = None,
        locations: dict[str, Any] | None = None,
        **resources: Any,
    ) -> StepJob:
        """What the workers of a step are told that reads the rows and a teacher; without a cache it runs online."""
        self.runs += 1
        teacher = fenced(self.root, "finetune", f"{self.runs:032x}")
        task = {"task": self.task.settings.model_dump(), "data": {"unit": "document"}}
        rows = {"train": train or self.train, "validation": self.validation, "test": self.validation}
        splits = {name: Split(shards=shards) for name, shards in rows.items()}
        trained = {"parameters": 0, "steps": 0, "best_step": 0, "validation_nats": None, "fp32_bytes": 0}
        files, hidden = upload_folder(teacher, self.teacher, Teacher.FOLDER), {"hidden": HIDDEN}
        online = TeacherCache(**ORIGIN, recipe={}, mode="online", dtype="", **hidden)
        steps: tuple[FinishedStep[Any], ...] = (
            FinishedStep(
                Tokens(**ORIGIN, recipe=task, vocabulary=VOCABULARY, end_of_text=None, splits=splits), self.tokens
            ),
            FinishedStep(Teacher(**ORIGIN, recipe={}, files=files, family=self.family, **trained, **hidden), teacher),
            cache or FinishedStep(online, teacher),
        )
        inputs = {step.record.stage: step for step in steps}
        return StepJob(
            recipe, inputs, fenced(self.root, "of-step", teacher.key), Resources(**resources), locations or {}
        )

    def run(
        self, recipe: Finetune | Distill, name: str, cache: FinishedStep[TeacherCache] | None = None, **resources: Any
    ) -> TrainingJob:
        self.runs += 1
        return TrainingJob(
            recipe=recipe,
            dir=fenced(self.root, "distill", f"{name}-{self.runs}"),
            tokens=self.tokens,
            train=self.train,
            validation=self.validation,
            resources=Resources(**{"micro_batch": 8, "checkpoint_minutes": 1000, **resources}),
            cache=cache,
            task=self.task,
        )

    def loop(self, run: TrainingJob, quant: Quant, device: torch.device = CPU) -> Trainer:
        student, distillation = (
            distill_stage.make(run, self.teacher, self.family, quant, device)
            if isinstance(run.recipe, Distill)
            else (WithStates(load_model(self.teacher)), None)
        )
        if isinstance(run.recipe, Finetune):
            set_dropout(student, run.recipe.dropout or 0.0)
        if quant.bits == "32-32-32" and distillation is not None:  # a copy of the teacher has nothing to learn
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer = Trainer(student, run, distillation, device, lambda done, total, note, points=(): None)
        trainer.clock = lambda: 60.0 * trainer.progress.step  # a step takes a minute
        return trainer


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def with_workers(world: int, root: Path, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(rank)` on `world` forked processes joined by gloo; what each returned (as JSON), by rank."""
    meeting = f"file://{root}/meeting-{uuid.uuid4().hex}"
    mp.start_processes(_worker, (world, meeting, str(root), work), nprocs=world, daemon=True, start_method="fork")
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(world)]


def _worker(rank: int, world: int, meeting: str, root: str, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    (Path(root) / f"rank-{rank}.json").write_text(json.dumps(work(rank)))
    dist.destroy_process_group()


def steps_of(loop: Trainer, steps: int) -> dict[str, Any]:
    """Take steps and tell the losses, the rows that were read, and the bank at the end."""
    rows: list[int] = []
    get = loop.rows.get

    def recording(row_ids: Any, then: Any = ()) -> Any:
        rows.extend(int(row) for row in row_ids)
        return get(row_ids, then)

    loop.rows.get = recording
    losses, read = [], []
    for step in range(loop.progress.step, loop.progress.step + steps):
        rows.clear()
        losses.append(mean_loss(loop, loop.train_step(step)))
        read.append(list(rows))
    bank = loop.distillation.bank if isinstance(loop.distillation, Distillation) else None
    return {
        "losses": losses,
        "rows": read,
        "bank": digest(bank.states) if bank else None,
        "seen": digest(bank.seen) if bank else None,
    }


def run_until(loop: Trainer, stop: int) -> None:
    """Train until so many steps are taken, all of them included, and leave all behind as a kill would."""
    take = loop.train_step

    def taking(step: int) -> dict[str, torch.Tensor]:
        if step == stop:
            raise InterruptedError
        return take(step)

    def report(done: int, total: int, note: str, points: Any = ()) -> None:
        if done == stop == total:
            raise InterruptedError

    loop.train_step, loop.report = taking, report  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        loop.run()


def mean_loss(loop: Trainer, losses: dict[str, torch.Tensor]) -> float:
    """The loss over the batch of all workers."""
    return float(loop._all_reduce(losses["loss"]))


def gradients(loop: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """First-step loss and gradients."""
    loss = mean_loss(loop, loop.backward(0))
    return loss, {name: p.grad.clone() for name, p in loop.model.named_parameters() if p.grad is not None}
