"""The teacher's last hidden states beside every training row, computed once by a pool of actors.

`online` stores nothing: the teacher then runs in each training step. Before any shard is made, a probe measures
what the stored dtype costs in KL(teacher || teacher from cache).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.training import Cache
from pipeline.distill.losses import logit_distillation_loss
from pipeline.errors import ConfigError, RunError
from pipeline.models.build import load_model
from pipeline.models.hidden_states import head_of, last_states
from pipeline.stages.stage import Step
from pipeline.store.records import Shard, StoredFile, Teacher, TeacherCache, Tokens
from pipeline.store.shards import (
    Rows,
    commit_shard,
    committed_shard,
    open_shard,
    read_tokens,
    states_name,
    write_states,
)
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.task import Batch, Task

VERSION = 1
PROBE_ROWS = 8
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}


def run(step: Step) -> TeacherCache:
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    mode = step.recipe["cache"]["mode"]
    if mode == "online":
        return TeacherCache(**step.identity(), mode="online", dtype="float32", hidden=teacher.hidden)
    recipe = Cache.model_validate(step.recipe["cache"])
    split, task = tokens.splits["train"], task_of(tokens.recipe)
    check_space(step.place, cache_bytes(split.rows, task.states, teacher.hidden, recipe.dtype), split.tokens)
    source = {"teacher": teacher_place, "files": teacher.files, "task": task}
    probe_settings = source | {"tokens": tokens_place, "shards": split.shards[:1], "dtype": recipe.dtype}
    dtype, kl_nats = step.engine.task(_probe, probe_settings, step.place)
    if kl_nats > recipe.max_kl_nats:
        raise RunError(
            f"Storing the teacher's states as {dtype} costs {kl_nats:.2e} nats a token, above cache.max_kl_nats "
            f"({recipe.max_kl_nats:g}). Set cache.dtype: float32, or raise cache.max_kl_nats."
        )
    settings = source | {
        "place": step.place,
        "tokens": tokens_place,
        "dtype": dtype,
        "batch": step.resources.inference_batch,
    }
    made = step.engine.shards(CacheShard, settings, split.shards, step.advance, gpus=step.resources.gpus_per_worker)
    found = sorted((Shard.model_validate_json(line) for line in made), key=lambda shard: shard.name)
    size = sum(size for name, size in step.place.sizes("rows/").items() if name.endswith(".arrow"))
    return TeacherCache(
        **step.identity(),
        mode="states",
        dtype=dtype,
        hidden=teacher.hidden,
        shards=tuple(found),
        bytes=size,
        kl_nats=kl_nats,
    )


def cache_bytes(rows: int, positions: int, hidden: int, dtype: str) -> int:
    """`positions`: states of a row."""
    return rows * positions * hidden * BYTES_OF[dtype]


def check_space(place: StepDir, needed: int, tokens: int) -> None:
    """Raises ConfigError if the states would not fit into what the store has left."""
    free = place.free_bytes()
    present = sum(place.sizes("rows/").values())
    if needed - present > free:
        raise ConfigError(
            f"The cache of {tokens:,} tokens needs {needed / 2**20:,.0f} MiB, and {place.storage_uri} has "
            f"{free / 2**20:,.0f} MiB left. Use cache.mode: online, another resources.storage_uri, or less text."
        )


class CacheShard:
    """Computes the states of one shard of rows at a time; a committed shard is not computed again."""

    def __init__(
        self,
        place: StepDir,
        tokens: StepDir,
        teacher: StepDir,
        files: dict[str, StoredFile],
        task: Task,
        dtype: str,
        batch: int,
    ) -> None:
        self.place, self.tokens, self.task, self.dtype, self.batch = place, tokens, task, dtype, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(teacher.folder(files, Teacher.FOLDER)).to(self.device).eval()

    def __call__(self, rows: Shard) -> str:
        name = states_name(rows.name)
        shard = committed_shard(self.place, name) or self._compute(rows, name)
        return shard.model_dump_json()

    @torch.no_grad()
    def _compute(self, rows: Shard, name: str) -> Shard:
        ids, lengths = (torch.from_numpy(x.astype(np.int64)) for x in read_tokens(open_shard(self.tokens, rows.name)))
        batches = map(self.task.batch, ids.split(self.batch), lengths.split(self.batch))
        states = torch.cat([row_states(self.model, batch.to(self.device)).cpu() for batch in batches])
        dtype = storable(states, self.dtype)
        return commit_shard(self.place, name, rows.rows, rows.tokens, lambda path: write_states(path, states, dtype))


def row_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The states of a batch, a row first: (rows, length, hidden), or (rows, sequences, length, hidden)."""
    states = last_states(model, *batch.inputs)
    return states if batch.group == 1 else states.unflatten(0, (-1, batch.group))


def storable(states: Tensor, dtype: str) -> str:
    """The dtype itself, or bfloat16 where it overflows; each shard says which it holds."""
    return dtype if torch.isfinite(states.to(getattr(torch, dtype))).all() else "bfloat16"


@torch.no_grad()
def _probe(
    teacher: StepDir, files: dict[str, StoredFile], task: Task, tokens: StepDir, shards: tuple[Shard, ...], dtype: str
) -> tuple[str, float]:
    """The dtype to store (float16 gives way to bfloat16 where it overflows) and its KL in nats per token."""
    model = load_model(teacher.folder(files, Teacher.FOLDER)).eval()
    reader = Rows(tokens, shards)
    ids, lengths, _ = reader.get(range(min(PROBE_ROWS, reader.rows)))
    batch = task.batch(ids, lengths)
    states = last_states(model, *batch.inputs)
    dtype = storable(states, dtype)
    head: Any = head_of(model)
    exact: Tensor = head(states)
    stored: Tensor = head(states.to(getattr(torch, dtype)).float())
    cross, count = logit_distillation_loss(stored, exact, batch.distilled)
    entropy, _ = logit_distillation_loss(exact, exact, batch.distilled)
    return dtype, max(0.0, float((cross - entropy) / count))
