"""The teacher's last hidden states beside every training row, or tokens drawn from its distributions, computed once by
a pool of actors.

`online` stores nothing: the teacher then runs in each training step. Before any shard is made, a probe measures
what the stored dtype costs in KL(teacher || teacher from cache), and on a GPU the bf16 of the teacher's pass and head
with it, which is all that online costs. Draws are right on average, so that theirs is what the distribution costs that
they are drawn from: nothing on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

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
from pipeline.stages.kept import Kept, KeptStates, finite, kept_by, logits_online
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.pieces import Pieces
from pipeline.store.records import ROWS, Precision, Shard, Teacher, TeacherCache, Tokens
from pipeline.store.shards import (
    Rows,
    Stored,
    cached_name,
    drawn_shards,
    is_sound,
    open_shard,
    read_tokens,
    store_shard,
    write_stored,
)
from pipeline.store.step_store import StepDir
from pipeline.tasks.batch import Batch

PROBE_SHARDS, PROBE_ROWS = 4, 8
LEAST_READS = 2  # of a row, from which its states are worth keeping
SHARDS_AT_ONCE = 4  # that a GPU's worker has in hand: it computes one while it hashes and writes those before
COMPUTING = threading.Lock()
KNOBS = {"states": {"dtype", "max_kl_nats"}, "logits": {"draws", "max_kl_nats"}, "online": {"max_kl_nats"}}


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return the decided mode, how something is stored, and what it may cost."""
    mode, _ = decide_mode(run)
    return {"cache": run.config.cache.model_dump(include=KNOBS[mode]) | {"mode": mode}}


def decide_mode(run: PinnedRun) -> tuple[str, str]:
    """Decide what of the teacher is cached, and say why.

    With `cache.mode: auto` states are stored if the run reads each row at least twice and all of them, so many tokens
    of this teacher's width, take at most `resources.max_cache_gib`; else the teacher runs in each step. Draws widen the
    gap, so that they are chosen by people alone, who are told their bytes where they would do. Rows are estimated from
    the text, even where they are known, so that a run that was begun goes on as it began. The mode enters keys, so that
    neither what the store has left, which the cache itself takes from, decides, nor what a machine measures of the
    teacher's cost, which is another on the next: plans tell both, and `check` refuses what does not fit.
    """
    cache, distill, limit = run.config.cache, run.config.distill, run.config.resources.max_cache_gib
    if cache.mode != "auto":
        return cache.mode, f"{cache.mode}: as configured"
    if distill.compared_layer != LAST:
        return "online", "online: cached states are those of the last layer, and distill.contrast_layer is another"
    rows = run.estimated_rows
    reads = distill.steps * distill.batch_size / rows if distill.steps is not None else distill.epochs or 0.0
    size_gib = cache_bytes(run, "states", rows) / 2**30
    mode = "states" if reads >= LEAST_READS and size_gib <= limit else "online"
    reason = (
        f"{mode}: each row is read about {reads:.1f} times ({LEAST_READS} or more are worth storing), and all states "
        f"take about {size_gib:.2f} GiB (resources.max_cache_gib is {limit:g})"
    )
    if mode == "online" and reads >= LEAST_READS and not run.config.needs_states:
        draws_gib = cache_bytes(run, "logits", rows) / 2**30
        reason += f"; cache.mode: logits takes about {draws_gib:.2f} GiB, for a somewhat wider gap"
    return mode, reason


def cache_bytes(run: PinnedRun, mode: str, rows: int) -> int:
    """Return the bytes of what a mode caches beside so many rows."""
    kept = kept_by(mode, run.config.cache, run)
    return 0 if kept is None else rows * kept.row_bytes(run.task.states, run.hidden)


def check(run: PinnedRun, step_dir: StepDir, tokens: Tokens | None) -> None:
    """Check that what is cached fits into what the store has left."""
    rows = tokens.splits["train"].rows if tokens else run.estimated_rows
    if needed := cache_bytes(run, decide_mode(run)[0], rows):
        check_space(step_dir, needed, rows * run.task.states)


def run(step: Step) -> TeacherCache:
    """Probe what is to be kept, then compute it for every training row."""
    tokens, hidden = step.input(Tokens).record, step.input(Teacher).record.hidden
    section, split = Cache.model_validate(step.recipe["cache"]), tokens.splits["train"]
    mode: Any = section.mode
    wanted, gpus = kept_by(mode, section, tokens), step.resources.gpus_per_worker
    if wanted is not None:
        check_space(step.dir, split.rows * wanted.row_bytes(step.task.states, hidden), split.tokens)
    kept, kl_nats, precision = cost_of(step, wanted)
    refuse_cost(section, kept, kl_nats or 0.0, precision)
    if kept is None:
        facts: dict[str, Any] = {"dtype": "float32", "kl_nats": kl_nats, "precision": precision}
        return TeacherCache(**step.identity(), mode=mode, hidden=hidden, **facts)
    make, at_once = partial(CacheShard, step.job, kept), SHARDS_AT_ONCE if gpus else 1
    lines = step.engine.shards(make, split.shards, step.advance, gpus, step.dir, at_once)
    shards: list[Shard] = []
    for line in lines:
        shards.append(Shard.model_validate_json(line))
        point = {"step": float(len(shards)), "cache_bytes": float(sum(shard.file.bytes for shard in shards))}
        step.advance(len(shards), len(split.shards), "", [point])
    shards.sort(key=lambda shard: shard.name)
    return TeacherCache(
        **step.identity(),
        mode=mode,
        dtype=kept.dtype,
        draws=section.draws if mode == "logits" else None,
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
    version=3,
    shared=True,
    repairs=True,
    unit="shards",
)


def check_space(step_dir: StepDir, needed: int, tokens: int) -> None:
    """Raise ConfigError if the cache would not fit into what the store has left."""
    free = step_dir.free_bytes()
    present = sum(step_dir.sizes(ROWS).values())
    if needed - present > free:
        raise ConfigError(
            f"The cache of {tokens:,} tokens needs {needed / 2**20:,.0f} MiB, and {step_dir.storage_uri} has "
            f"{free / 2**20:,.0f} MiB left. Use cache.mode: online, another resources.storage_uri, or less text."
        )


def cost_of(step: Step, wanted: Kept | None) -> tuple[Kept | None, float | None, Precision]:
    """Return what `probe` does, where there is something to measure: a teacher that runs in each step costs nothing on
    a CPU, and None is known of one that is shared out among GPUs, any of which may be too small for it."""
    gpus = step.resources.gpus_per_worker
    if wanted is None and not gpus:
        return None, 0.0, "fp32"
    if wanted is None and step.resources.strategy == "fsdp":
        return None, None, "bf16"
    return step.engine.task(partial(probe, step.job, wanted), step.dir, gpus)


def refuse_cost(section: Cache, kept: Kept | None, kl_nats: float, precision: Precision) -> None:
    """Raise RunError if a teacher costs more nats a token than it may, kept so, or in each step where nothing is."""
    if kl_nats > section.max_kl_nats:
        taught = "in each step" if kept is None else f"kept as {kept}"
        exact = () if kept is None else kept.exact
        ways = [*exact, *(["resources.gpus_per_worker: 0"] if precision == "bf16" else [])]
        raise RunError(
            f"The teacher in {precision}, {taught}, costs {kl_nats:.2e} nats a token, above cache.max_kl_nats "
            f"({section.max_kl_nats:g}). Set {' and '.join(ways)}, or raise cache.max_kl_nats."
        )


class CacheShard:
    """Computes what is kept beside one shard of rows at a time; a sound one that is there is not computed again."""

    def __init__(self, job: StepJob, kept: Kept) -> None:
        self.dir, self.tokens, self.task, self.kept = job.dir, job.input(Tokens).dir, job.task, kept
        self.made = Pieces(job.dir, "parts/")
        self.batch = job.resources.inference_batch  # rows of a pass
        self.device = device_for(job.resources)
        self.model = load_model(job.input(Teacher).folder()).to(self.device).eval()
        use_causal_attention(self.model)

    def __call__(self, rows: Shard) -> str:
        name = cached_name(rows.name)
        shard: Shard | None = self.made.get(name, Shard.model_validate)
        if shard is None or not is_sound(self.dir, shard):
            shard = self._compute(rows, name)
            self.made.put(name, shard.model_dump())
        return shard.model_dump_json()

    def _compute(self, rows: Shard, name: str) -> Shard:
        arrays = read_tokens(open_shard(self.tokens, rows))
        ids, lengths = (torch.from_numpy(array.astype(np.int64)).split(self.batch) for array in arrays)
        batches = list(map(self.task.batch, ids, lengths))
        stored, fits = self._stored(batches, self.kept)
        if not fits:
            stored, _ = self._stored(batches, KeptStates("bfloat16"))
        return store_shard(self.dir, name, rows.rows, rows.tokens, lambda path: write_stored(path, stored))

    @torch.no_grad()
    def _stored(self, batches: Sequence[Batch], kept: Kept) -> tuple[Stored, bool]:
        """Return on the host what is stored, and whether the dtype holds it. The host waits for a GPU once, and lets it
        go on with another thread's shard meanwhile."""
        rows, done = sum(len(batch.ids) // batch.group for batch in batches), 0
        all_fit, fits = torch.ones((), dtype=torch.bool), room_on_host((), torch.bool, self.device)
        with COMPUTING, bf16_on_gpu(self.device):
            for batch in batches:
                stored = kept.of(self.model, batch.to(self.device))
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


@torch.no_grad()
def probe(job: StepJob, wanted: Kept | None) -> tuple[Kept | None, float, Precision]:
    """Return what is to be kept (float16 gives way to bfloat16 where it overflows), the KL in nats per token from the
    teacher in fp32 to what a student learns from, in the precision of its steps, and what that is."""
    device, tokens = device_for(job.resources), job.input(Tokens)
    model = load_model(job.input(Teacher).folder()).to(device).eval()
    use_causal_attention(model)
    reader = Rows(tokens.dir, drawn_shards(tokens.record.splits["train"].shards, PROBE_SHARDS))
    ids, lengths, _ = reader.get(reader.drawn(PROBE_ROWS))
    batch = job.task.batch(ids, lengths).to(device)
    head: Any = head_of(model)
    exact: Tensor = head(last_states(model, *batch.inputs))
    kept, logits = (None, logits_online(model, batch)) if wanted is None else wanted.probed(model, batch)
    cross, count = logit_distillation_loss(logits, exact, batch.distilled)
    entropy, _ = logit_distillation_loss(exact, exact, batch.distilled)
    return kept, max(0.0, float((cross - entropy) / count)), "bf16" if device.type == "cuda" else "fp32"
