"""What a run takes, by arithmetic: hours of workers, bytes of the teacher's cache, requests to S3, and money where
prices are given; and how often each row must be read for a cache to be cheaper than the teacher in each step.

All of it is an estimate. Nothing but a GPU's rates was measured beforehand, of one model on one H200 (`bitmill bench
train`; the numbers are those of jobs/bench/results/train-h200.json); other models are scaled by their parameters, other
GPUs by what a large product of matrices reaches there. CPUs differ too much: this machine is asked, in a moment.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from statistics import mean

import torch

from pipeline.config.resources import Prices, Resources
from pipeline.config.training import Distill, Finetune
from pipeline.execution.engine import set_threads
from pipeline.flow import requests
from pipeline.flow.plan import PlannedStep, RunPlan
from pipeline.flow.requests import NONE, Requests
from pipeline.flow.run import worker_seconds
from pipeline.models.blocks import depth_of
from pipeline.models.device import CPU, device_for, this_device
from pipeline.models.hidden_states import LAST
from pipeline.stages.cache import cache_bytes
from pipeline.store.records import Student, Teacher, TeacherCache, Tokens
from pipeline.store.shards import rows_per_shard
from pipeline.store.step_store import records

FORWARD, TRAINING = 2, 6  # operations for each parameter and token
HOUR_S, GIB, MILLION = 3600.0, 2**30, 1e6
TOKEN_BYTES = 2  # of the shards of rows, about, which are compressed
# Of the rate of a large product, what training small models reaches on CPUs: 0.27 and 0.36 where we measured it, with
# the teacher or its head counted.
REACHED = 0.3
WITH_HEAD = TRAINING + FORWARD


@dataclass(frozen=True)
class Model:
    """What of a model its cost depends on."""

    parameters: int
    layers: int


@dataclass(frozen=True)
class Measured:
    """Tokens a second of each kind of work, measured on one device with one model."""

    device: str
    model: Model
    flops_per_s: float  # of a large product of matrices
    token_bytes: int  # cached
    pass_tokens: int  # that go through the model at once
    finetune: float
    best: float  # preset best, cached states
    paper: float  # preset paper, cached states
    paper_in_four: float  # the same, in passes of a quarter of the tokens
    best_online: float
    cache: float
    forward: float  # the teacher's pass alone, without its head


H200 = Measured(
    device="one NVIDIA H200",
    model=Model(124_046_592, 12),
    flops_per_s=758.8e12,
    token_bytes=1_536,
    pass_tokens=16_384,
    finetune=347_429,
    best=294_258,
    paper=235_231,
    paper_in_four=89_973,
    best_online=192_501,
    cache=192_093,
    forward=1_328_171,
)


@dataclass(frozen=True)
class Rates:
    """What a worker's device does: `flops_per_s` of a large product of matrices, and the share of it that each kind of
    work reaches, by the operations that a model's parameters ask for."""

    flops_per_s: float
    finetuning: float
    distilling: float  # from cached states, or from draws
    contrasting: float  # the same, with the contrastive loss
    passing: float  # the teacher's pass
    stored_bytes_per_s: float = math.inf  # of a cache, computed, hashed and written
    pass_tokens: float = 0.0  # that went through the model at once where the shares were measured
    pass_s: float = 0.0  # that each pass of what trains takes, by layer, whatever goes through
    taught_pass_s: float = 0.0  # the same of the teacher's, in a step
    basis: str = ""

    @classmethod
    def of(cls, measured: Measured) -> Rates:
        """Return the rates that a measurement comes to."""

        def share(operations: int, tokens_per_s: float) -> float:
            return operations * measured.model.parameters * tokens_per_s / measured.flops_per_s

        passes = measured.pass_tokens * (1 / measured.paper_in_four - 1 / measured.paper)  # the time of three more
        teacher_s = 1 / measured.best_online - 1 / measured.best  # a token
        return cls(
            flops_per_s=measured.flops_per_s,
            finetuning=share(TRAINING, measured.finetune),
            distilling=share(TRAINING, measured.best),
            contrasting=share(TRAINING, measured.paper),
            passing=share(FORWARD, measured.forward),
            stored_bytes_per_s=measured.token_bytes / (1 / measured.cache - 1 / measured.forward),
            pass_tokens=measured.pass_tokens,
            pass_s=passes / 3 / measured.model.layers,
            taught_pass_s=measured.pass_tokens * (teacher_s - 1 / measured.forward) / measured.model.layers,
            basis=f"measured on {measured.device} with {measured.model.parameters / 1e6:.0f}M parameters and "
            f"{measured.pass_tokens:,} tokens a pass in bf16, scaled by parameters",
        )

    def finetune_s(self, model: Model, tokens: float, pass_tokens: float = math.inf) -> float:
        """Return the seconds to train a teacher on so many tokens, so many of them at once."""
        return self._seconds(TRAINING, model, tokens, self.finetuning) + self._passes_s(model, tokens, pass_tokens)

    def distill_s(self, model: Model, tokens: float, contrast: bool, pass_tokens: float = math.inf) -> float:
        """Return the seconds to train a student from what is cached of its teacher."""
        share = self.contrasting if contrast else self.distilling
        return self._seconds(TRAINING, model, tokens, share) + self._passes_s(model, tokens, pass_tokens)

    def teach_s(self, model: Model, tokens: float, pass_tokens: float = math.inf) -> float:
        """Return the seconds that the teacher adds where it runs in each step."""
        launched = tokens / pass_tokens * model.layers * self.taught_pass_s
        return self._seconds(FORWARD, model, tokens, self.passing) + launched

    def cache_s(self, model: Model, tokens: float, token_bytes: float) -> float:
        """Return the seconds to fill a cache."""
        passed = self._seconds(FORWARD, model, tokens, self.passing)
        return passed + tokens * token_bytes / self.stored_bytes_per_s

    def _seconds(self, operations: int, model: Model, tokens: float, share: float) -> float:
        return operations * model.parameters * tokens / (share * self.flops_per_s)

    def _passes_s(self, model: Model, tokens: float, pass_tokens: float) -> float:
        """Return what passes take that are more than were measured."""
        more = tokens / pass_tokens - (tokens / self.pass_tokens if self.pass_tokens else math.inf)
        return max(0.0, more) * model.layers * self.pass_s


def rates_of(resources: Resources) -> Rates:
    """Return the rates of a worker's device. `resources.worker_tflops` says what a large product reaches there; else a
    GPU is this machine's, or an H200, and a CPU this machine's, of as many threads as a worker has."""
    given = resources.worker_tflops
    if resources.gpus_per_worker:
        rates, here = Rates.of(H200), this_device()
        if given is None and (resources.ray_address is not None or here == CPU):
            return rates
        flops = given * 1e12 if given is not None else flops_per_s(here)
        other = f" and to {flops / 1e12:,.0f} of its {rates.flops_per_s / 1e12:,.0f} TFLOP/s"
        return replace(rates, flops_per_s=flops, basis=rates.basis + other)
    if given is None:
        set_threads(max(1, int(resources.cpus_per_worker)))
    flops = given * 1e12 if given is not None else flops_per_s(device_for(resources))
    whose = "resources.worker_tflops says" if given is not None else "this machine's matrix products reach"
    return Rates(
        flops_per_s=flops,
        finetuning=REACHED,
        distilling=REACHED * TRAINING / WITH_HEAD,
        contrasting=REACHED * TRAINING / WITH_HEAD,
        passing=REACHED,
        basis=f"estimated: parameters and tokens at {flops / 1e9:,.1f} GFLOP/s, {REACHED:g} of what {whose}; no rate "
        "of a CPU was measured beforehand",
    )


def flops_per_s(device: torch.device) -> float:
    """Measure the rate of a large product of matrices on a device of this machine, operations a second: of bf16 on a
    GPU, else of fp32."""
    size, dtype = (512, torch.float32) if device == CPU else (8192, torch.bfloat16)
    repeats, matrix = 8, torch.ones(size, size, device=device, dtype=dtype)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)


@dataclass(frozen=True)
class StepCost:
    """What one step takes. Tokens are counted as often as they are read, steps are optimizer steps."""

    tokens: float = 0.0
    steps: int = 0
    worker_seconds: float = 0.0
    requests: Requests = NONE


def step_cost(step: PlannedStep, plan: RunPlan, rates: Rates) -> StepCost:
    """Return what a step of a plan takes. Text, scores and packages are not counted, but for their requests."""
    kind, task, resources, rows = step.stage.record, plan.pinned.task, plan.config.resources, plan.rows
    model, workers = model_of(plan), max(1, resources.workers)
    at_once, corpus = resources.micro_batch * task.row_tokens, rows * task.row_tokens
    shards, states = shards_of(plan), plan.cache_bytes
    tokens, steps, seconds, asked = 0.0, 0, 0.0, NONE
    row_bytes = TOKEN_BYTES * corpus / shards
    if kind is Tokens:
        asked = requests.of_rows(shards, row_bytes, 1)
    elif kind is Teacher and plan.config.finetune is not None:
        section: Finetune | Distill = plan.config.finetune
        steps = section.optimizer_steps(rows)
        tokens = float(steps * section.batch_size * task.row_tokens)
        seconds = rates.finetune_s(model, tokens, at_once)
        asked = _read(resources, shards, row_bytes, tokens / corpus)
    elif kind is TeacherCache and states:
        tokens = float(corpus)
        seconds = rates.cache_s(model, tokens, states / corpus)
        asked = requests.of_rows(shards, states / shards, shards) + requests.fetched(row_bytes) * shards
    elif kind is Student:
        section = plan.config.distill
        steps = section.optimizer_steps(rows)
        tokens = float(steps * section.batch_size * task.row_tokens)
        seconds = rates.distill_s(model, tokens, section.contrast_weight > 0, at_once)
        seconds += rates.teach_s(model, tokens, at_once) if not states else 0.0
        asked = _read(resources, shards, row_bytes, tokens / corpus)
        asked += _read(resources, shards, states / shards, tokens / corpus) if states else NONE
    if steps:
        kept = seconds / workers / (60 * resources.checkpoint_minutes)
        asked += requests.of_checkpoints(kept, plan.parameters)
    asked += requests.of_step(seconds / workers, plan.parameters)
    return StepCost(tokens, steps, seconds, asked if resources.storage_uri.startswith("s3://") else NONE)


def _read(resources: Resources, shards: float, shard_bytes: float, reads: float) -> Requests:
    """Return what reading shards makes that each node reads all of: once where its copies have room for them, else at
    each of the reads."""
    fits = shards * shard_bytes <= resources.local_cache_gib * GIB
    times = min(1.0, reads) if fits else reads
    return requests.fetched(shard_bytes) * (shards * times * max(1, resources.workers))


def model_of(plan: RunPlan) -> Model:
    """Return what of a plan's model its cost depends on."""
    return Model(plan.parameters, sum(depth_of(plan.pinned.settings)))


def shards_of(plan: RunPlan) -> int:
    """Return how many shards of training rows there are."""
    if plan.tokens is not None:
        return len(plan.tokens.splits["train"].shards)
    return max(1, math.ceil(plan.rows / rows_per_shard(plan.pinned.task.row_tokens)))


def trained_rows(section: Finetune | Distill, rows: int) -> int:
    """Return the rows that a recipe trains on, each as often as it is read; those of a step at least."""
    return max(1, section.optimizer_steps(rows)) * section.batch_size


def timed_before(plan: RunPlan) -> list[float]:
    """Return the worker-seconds of a row of training, of students of the same teacher that were trained in one go."""
    return [
        seconds / (record.steps * record.recipe["distill"]["batch_size"])
        for record in records(plan.step(Student).dir.storage_uri, Student)
        if record.inputs.get(Teacher.stage) == plan.step(Teacher).key
        and (seconds := worker_seconds(record))
        and record.steps
    ]


def corrected(plan: RunPlan, rates: Rates, row_s: float) -> float:
    """Return by what all estimates are multiplied so that a row of distillation takes what was measured."""
    cost = step_cost(plan.step(Student), plan, rates)
    return row_s * trained_rows(plan.config.distill, plan.rows) / cost.worker_seconds


@dataclass(frozen=True)
class Caching:
    """Whether a cache of the teacher's states is worth it. `reads` are those of each row; from `pays_from` on the cache
    is cheaper than the teacher in each step, None: never. A million tokens cost `once` to be cached, what keeping them
    costs included; each time that they are read the teacher costs `each` more than reading what is cached."""

    reads: float
    pays_from: float | None
    by: str  # worker-hours or prices
    once: float
    each: float

    @property
    def told(self) -> str:
        """Return it in one line, for people."""
        other = "more" if self.each >= 0 else "less"
        costs = (
            f"by {self.by}, a cache of states costs {self.once:.3g} for a million tokens, once, and the teacher in "
            f"each step {abs(self.each):.3g} {other} than reads of it"
        )
        if self.pays_from is None:
            return f"{costs}: online is always cheaper, however often rows are read"
        cheaper = "the cache" if self.reads >= self.pays_from else "online"
        return (
            f"{costs}, so that the cache pays from {self.pays_from:.1f} reads of each row on; here are "
            f"{self.reads:.1f}: {cheaper} is cheaper"
        )


def caching(
    model: Model, rates: Rates, prices: Prices, token_bytes: float, reads: float, pass_tokens: float = math.inf
) -> Caching:
    """Compare what a cache of the teacher's states costs, made once and read each time, with what the teacher costs in
    each step: in money where a worker's hour has a price, else in hours of workers alone."""
    make, save = rates.cache_s(model, 1.0, token_bytes), rates.teach_s(model, 1.0, pass_tokens)
    by, hour = "worker-hours", prices.worker_hour
    make, save = make / HOUR_S, save / HOUR_S
    if hour is not None:
        by, parts = "prices", token_bytes / requests.PART_BYTES
        kept = token_bytes / GIB * prices.gib_month * prices.cache_months
        make = make * hour + kept + parts * prices.thousand_writes / 1000
        save = save * hour - parts * prices.thousand_reads / 1000
    return Caching(reads, make / save if save > 0 else None, by, MILLION * make, MILLION * save)


def money(prices: Prices, worker_hours: float, stored_bytes: float, asked: Requests) -> float | None:
    """Return what all costs, in the currency of the prices; None where a worker's hour has none."""
    if prices.worker_hour is None:
        return None
    kept = stored_bytes / GIB * prices.gib_month * prices.cache_months
    each = asked.writes * prices.thousand_writes + asked.reads * prices.thousand_reads
    return worker_hours * prices.worker_hour + kept + each / 1000


@dataclass(frozen=True)
class Estimate:
    """The cost of the steps of a run that are left, by stage."""

    steps: dict[str, StepCost]
    basis: str
    cache_bytes: int  # of a cache that is to be made
    cost: float | None
    caching: Caching | None  # None: no student is to be trained, or states cannot be cached

    @property
    def worker_hours(self) -> float:
        """Return the hours of all workers."""
        return sum(cost.worker_seconds for cost in self.steps.values()) / HOUR_S

    @property
    def requests(self) -> Requests:
        """Return the requests to S3; none with a directory."""
        return sum((cost.requests for cost in self.steps.values()), NONE)


def estimate(plan: RunPlan) -> Estimate:
    """Return what the steps take that are left of a run; it may look at the store, and measures this machine."""
    rates = rates_of(plan.config.resources)
    basis, factor, kinds = rates.basis, 1.0, [step.stage.record for step in plan.left]
    trains = Student in kinds
    if trains and plan.config.distill.steps != 0 and (timed := timed_before(plan)):
        factor = corrected(plan, rates, mean(timed))
        basis = f"measured: {len(timed)} students of this teacher in the store"
    costs = {}
    for step in plan.left:
        cost = step_cost(step, plan, rates)
        costs[step.name] = replace(cost, worker_seconds=cost.worker_seconds * factor)
    stored = plan.cache_bytes if TeacherCache in kinds else 0
    whole = Estimate(costs, basis, stored, None, compared(plan, rates, 1) if trains else None)
    return replace(whole, cost=money(plan.config.resources.prices, whole.worker_hours, stored, whole.requests))


def compared(plan: RunPlan, rates: Rates, students: float) -> Caching | None:
    """Return whether a cache of states is worth it to so many students of one teacher; None where there can be none."""
    if plan.config.distill.compared_layer != LAST:
        return None
    task, rows = plan.pinned.task, plan.rows
    token_bytes = cache_bytes(plan.pinned, "states", rows) / (rows * task.row_tokens)
    reads = students * trained_rows(plan.config.distill, rows) / rows
    resources = plan.config.resources
    at_once = resources.micro_batch * task.row_tokens
    return caching(model_of(plan), rates, resources.prices, token_bytes, reads, at_once)
