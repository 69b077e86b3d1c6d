"""The teacher's last hidden states beside every training row, computed once by a pool of actors.

`online` stores nothing: the teacher then runs in each training step. Before any shard is made, a probe measures
what the stored dtype costs in KL(teacher || teacher from cache).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Cache
from pipeline.distill.losses import logit_distillation_loss, valid_tokens
from pipeline.errors import ConfigError, RunError
from pipeline.families.models import last_states, load_model
from pipeline.records import Shard, StoredFile, Teacher, TeacherCache, Tokens
from pipeline.step import Step
from pipeline.store import Place
from pipeline.tables import Rows, commit_shard, committed_shard, open_shard, read_tokens, states_name, write_states

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
    split = tokens.splits["train"]
    check_space(step.place, cache_bytes(split.rows, tokens.block_length, teacher.hidden, recipe.dtype), split.tokens)
    source = {"teacher": teacher_place, "files": teacher.files}
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


def cache_bytes(rows: int, block_length: int, hidden: int, dtype: str) -> int:
    return rows * block_length * hidden * BYTES_OF[dtype]


def check_space(place: Place, needed: int, tokens: int) -> None:
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
        self, place: Place, tokens: Place, teacher: Place, files: dict[str, StoredFile], dtype: str, batch: int
    ) -> None:
        self.place, self.tokens, self.dtype, self.batch = place, tokens, dtype, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(teacher.folder(files, Teacher.FOLDER)).to(self.device).eval()

    def __call__(self, rows: Shard) -> str:
        name = states_name(rows.name)
        shard = committed_shard(self.place, name) or self._compute(rows, name)
        return shard.model_dump_json()

    @torch.no_grad()
    def _compute(self, rows: Shard, name: str) -> Shard:
        ids, _ = read_tokens(open_shard(self.tokens, rows.name))
        batches = torch.from_numpy(ids.astype(np.int64)).split(self.batch)
        states = torch.cat([last_states(self.model, batch.to(self.device)).cpu() for batch in batches])
        dtype = storable(states, self.dtype)
        return commit_shard(self.place, name, rows.rows, rows.tokens, lambda path: write_states(path, states, dtype))


def storable(states: Tensor, dtype: str) -> str:
    """The dtype itself, or bfloat16 where it overflows; each shard says which it holds."""
    return dtype if torch.isfinite(states.to(getattr(torch, dtype))).all() else "bfloat16"


@torch.no_grad()
def _probe(
    teacher: Place, files: dict[str, StoredFile], tokens: Place, shards: tuple[Shard, ...], dtype: str
) -> tuple[str, float]:
    """The dtype to store (float16 gives way to bfloat16 where it overflows) and its KL in nats per token."""
    model = load_model(teacher.folder(files, Teacher.FOLDER)).eval()
    reader = Rows(tokens, shards)
    ids, lengths, _ = reader.get(range(min(PROBE_ROWS, reader.rows)))
    states = last_states(model, ids)
    dtype = storable(states, dtype)
    head: Any = model.get_output_embeddings()
    exact: Tensor = head(states)
    stored: Tensor = head(states.to(getattr(torch, dtype)).float())
    valid = valid_tokens(lengths, ids.shape[1])
    cross, count = logit_distillation_loss(stored, exact, valid)
    entropy, _ = logit_distillation_loss(exact, exact, valid)
    return dtype, max(0.0, float((cross - entropy) / count))
