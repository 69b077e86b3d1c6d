"""The teacher's last hidden states beside every training row, computed once by a pool of actors.

`online` stores nothing: the teacher then runs in each training step. Before any shard is made, a probe measures
what the stored dtype costs in KL(teacher || teacher from cache), and on a GPU the bf16 of the teacher's pass with it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.training import Cache
from pipeline.distill.losses import logit_distillation_loss
from pipeline.errors import ConfigError, RunError
from pipeline.models.attention import use_causal_attention
from pipeline.models.build import load_model
from pipeline.models.device import all_so_far, bf16_on_gpu, device_for, room_on_host
from pipeline.models.hidden_states import LAST, head_of, last_states
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.keys import recipe_of
from pipeline.store.pieces import Pieces
from pipeline.store.records import ROWS, Precision, Shard, Teacher, TeacherCache, Tokens
from pipeline.store.shards import (
    Rows,
    StoredStates,
    drawn_shards,
    is_sound,
    open_shard,
    read_tokens,
    states_name,
    store_shard,
    write_states,
)
from pipeline.store.step_store import StepDir
from pipeline.tasks.batch import Batch

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedModel

PROBE_SHARDS, PROBE_ROWS = 4, 8
LEAST_READS = 2  # of a row, from which its states are worth keeping
SHARDS_AT_ONCE = 4  # that a GPU's worker has in hand: it computes one while it hashes and writes those before
COMPUTING = threading.Lock()
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return the decided mode and, where states are stored, how."""
    mode, _ = decide_mode(run)
    return {"cache": (recipe_of(run.config.cache) if mode == "states" else {}) | {"mode": mode}}


def decide_mode(run: PinnedRun) -> tuple[str, str]:
    """Decide where a teacher's states come from, and say why.

    With `cache.mode: auto` they are stored if the run reads each row at least twice and all of them, so many tokens of
    this teacher's width, take at most `resources.max_cache_gib`; else the teacher runs in each step. Rows are estimated
    from the text, even where they are known, so that a run that was begun goes on as it began. The mode enters keys, so
    what the store has left, which the states themselves take from, does not decide: `check` refuses what does not fit.
    """
    cache, distill, limit = run.config.cache, run.config.distill, run.config.resources.max_cache_gib
    if cache.mode != "auto":
        return cache.mode, f"{cache.mode}: as configured"
    if distill.compared_layer != LAST:
        return "online", "online: cached states are those of the last layer, and distill.contrast_layer is another"
    rows = run.estimated_rows
    reads = distill.steps * distill.batch_size / rows if distill.steps is not None else distill.epochs or 0.0
    size_gib = cache_bytes(rows, run.task.states, run.hidden, cache.dtype) / 2**30
    mode = "states" if reads >= LEAST_READS and size_gib <= limit else "online"
    return mode, (
        f"{mode}: each row is read about {reads:.1f} times ({LEAST_READS} or more are worth storing), and all states "
        f"take about {size_gib:.2f} GiB (resources.max_cache_gib is {limit:g})"
    )


def check(run: PinnedRun, step_dir: StepDir, tokens: Tokens | None) -> None:
    """Check that the states fit into what the store has left."""
    if decide_mode(run)[0] == "states":
        rows, width = tokens.splits["train"].rows if tokens else run.estimated_rows, run.task.states
        check_space(step_dir, cache_bytes(rows, width, run.hidden, run.config.cache.dtype), rows * width)


def run(step: Step) -> TeacherCache:
    """Probe the dtype, then compute the states of every training row."""
    split, hidden = step.input(Tokens).record.splits["train"], step.input(Teacher).record.hidden
    if step.recipe["cache"]["mode"] == "online":
        return TeacherCache(**step.identity(), mode="online", dtype="float32", hidden=hidden)
    section = Cache.model_validate(step.recipe["cache"])
    check_space(step.dir, cache_bytes(split.rows, step.task.states, hidden, section.dtype), split.tokens)
    gpus = step.resources.gpus_per_worker
    dtype, kl_nats, precision = step.engine.task(partial(probe, step.job, section.dtype), step.dir, gpus)
    if kl_nats > section.max_kl_nats:
        in_fp32 = " and resources.gpus_per_worker: 0" if precision == "bf16" else ""
        raise RunError(
            f"The teacher's states, computed in {precision} and stored as {dtype}, cost {kl_nats:.2e} nats a token, "
            f"above cache.max_kl_nats ({section.max_kl_nats:g}). Set cache.dtype: float32{in_fp32}, or raise "
            "cache.max_kl_nats."
        )
    make, at_once = partial(CacheShard, step.job, dtype), SHARDS_AT_ONCE if gpus else 1
    lines = step.engine.shards(make, split.shards, step.advance, gpus, step.dir, at_once)
    shards: list[Shard] = []
    for line in lines:
        shards.append(Shard.model_validate_json(line))
        point = {"step": float(len(shards)), "cache_bytes": float(sum(shard.file.bytes for shard in shards))}
        step.advance(len(shards), len(split.shards), "", [point])
    shards.sort(key=lambda shard: shard.name)
    return TeacherCache(
        **step.identity(),
        mode="states",
        dtype=dtype,
        hidden=hidden,
        shards=tuple(shards),
        bytes=sum(shard.file.bytes for shard in shards),
        kl_nats=kl_nats,
        precision=precision,
    )


STAGE = Stage(
    TeacherCache,
    always(Tokens, Teacher),
    recipe,
    run,
    check=check,
    version=2,
    shared=True,
    repairs=True,
    unit="shards",
)


def cache_bytes(rows: int, positions: int, hidden: int, dtype: str) -> int:
    """Return the bytes of the states of so many rows, each with so many positions; int8 codes have fp32 scales."""
    scales = 4 * (positions + hidden) if dtype == "int8" else 0
    return rows * (positions * hidden * BYTES_OF[dtype] + scales)


def check_space(step_dir: StepDir, needed: int, tokens: int) -> None:
    """Raise ConfigError if the states would not fit into what the store has left."""
    free = step_dir.free_bytes()
    present = sum(step_dir.sizes(ROWS).values())
    if needed - present > free:
        raise ConfigError(
            f"The cache of {tokens:,} tokens needs {needed / 2**20:,.0f} MiB, and {step_dir.storage_uri} has "
            f"{free / 2**20:,.0f} MiB left. Use cache.mode: online, another resources.storage_uri, or less text."
        )


class CacheShard:
    """Computes the states of one shard of rows at a time; a sound one that is there is not computed again."""

    def __init__(self, job: StepJob, dtype: str) -> None:
        self.dir, self.tokens, self.task, self.dtype = job.dir, job.input(Tokens).dir, job.task, dtype
        self.made = Pieces(job.dir, "parts/")
        self.batch = job.resources.inference_batch  # rows of a pass
        self.device = device_for(job.resources)
        self.model = load_model(job.input(Teacher).folder()).to(self.device).eval()
        use_causal_attention(self.model)

    def __call__(self, rows: Shard) -> str:
        name = states_name(rows.name)
        shard: Shard | None = self.made.get(name, Shard.model_validate)
        if shard is None or not is_sound(self.dir, shard):
            shard = self._compute(rows, name)
            self.made.put(name, shard.model_dump())
        return shard.model_dump_json()

    def _compute(self, rows: Shard, name: str) -> Shard:
        arrays = read_tokens(open_shard(self.tokens, rows))
        ids, lengths = (torch.from_numpy(array.astype(np.int64)).split(self.batch) for array in arrays)
        batches = list(map(self.task.batch, ids, lengths))
        states, fits = self._states(batches, self.dtype)
        if not fits:
            states, _ = self._states(batches, "bfloat16")
        return store_shard(self.dir, name, rows.rows, rows.tokens, lambda path: write_states(path, states))

    @torch.no_grad()
    def _states(self, batches: Sequence[Batch], dtype: str) -> tuple[StoredStates, bool]:
        """Return states on the host as they are stored, and whether the dtype holds them. The host waits for a GPU
        once, and lets it go on with another thread's shard meanwhile."""
        rows, done = sum(len(batch.ids) // batch.group for batch in batches), 0
        all_fit, fits = torch.ones((), dtype=torch.bool), room_on_host((), torch.bool, self.device)
        with COMPUTING, bf16_on_gpu(self.device):
            for batch in batches:
                stored = StoredStates.of(row_states(self.model, batch.to(self.device)), dtype)
                if not done:
                    gathered = stored.each(lambda t: room_on_host((rows, *t.shape[1:]), t.dtype, self.device))
                here = slice(done, done := done + len(stored.values))
                for room, tensor in zip(gathered.tensors, stored.tensors, strict=True):
                    room[here].copy_(tensor, non_blocking=True)
                all_fit = finite(stored) & all_fit
            fits.copy_(all_fit, non_blocking=True)
            wait = all_so_far(self.device)
        wait()
        return gathered, bool(fits)


def row_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the states of a batch, a row first: (rows, length, hidden), or (rows, sequences, length, hidden)."""
    states = last_states(model, *batch.inputs)
    return states if batch.group == 1 else states.unflatten(0, (-1, batch.group))


def finite(stored: StoredStates) -> Tensor:
    """Return whether the dtype holds all states, bool, where they lie; float16 may overflow."""
    return stored.tensors[-1].isfinite().all()


@torch.no_grad()
def probe(job: StepJob, dtype: str) -> tuple[str, float, Precision]:
    """Return the dtype to store (float16 gives way to bfloat16 where it overflows), the KL in nats per token from the
    teacher in fp32 to what is stored, and what it is computed in."""
    device, tokens = device_for(job.resources), job.input(Tokens)
    model = load_model(job.input(Teacher).folder()).to(device).eval()
    use_causal_attention(model)
    reader = Rows(tokens.dir, drawn_shards(tokens.record.splits["train"].shards, PROBE_SHARDS))
    ids, lengths, _ = reader.get(reader.drawn(PROBE_ROWS))
    batch = job.task.batch(ids, lengths).to(device)
    head: Any = head_of(model)
    exact: Tensor = head(last_states(model, *batch.inputs))
    with bf16_on_gpu(device):
        states = last_states(model, *batch.inputs)
    stored = StoredStates.of(states, dtype)
    if not finite(stored):
        stored = StoredStates.of(states, dtype := "bfloat16")
    cross, count = logit_distillation_loss(head(stored.float()), exact, batch.distilled)
    entropy, _ = logit_distillation_loss(exact, exact, batch.distilled)
    return dtype, max(0.0, float((cross - entropy) / count)), "bf16" if device.type == "cuda" else "fp32"
