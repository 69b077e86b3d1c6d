"""The straight line: `plan` says what would run and why, `run` does it. Record there: load; else run, commit.

text -> tokenize -> finetune -> cache -> distill -> evaluate -> pack -> register
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from pipeline.config.run import Config
from pipeline.errors import ConfigError, DamagedError
from pipeline.execution.engine import Engine
from pipeline.flow import preflight
from pipeline.models.hidden_states import LAST
from pipeline.stages import cache, distill, evaluate, finetune, pack, register, sensitivity, tokenize
from pipeline.stages.stage import Done, Step
from pipeline.store.keys import differences, recipe_of, step_key
from pipeline.store.locations import scratch_dir, storage_uri, tracking_uri
from pipeline.store.records import (
    ModelVersion,
    Package,
    Record,
    Report,
    Sensitivity,
    Student,
    Teacher,
    TeacherCache,
    Tokens,
)
from pipeline.store.step_store import StepDir, check_writable, records
from pipeline.tracking import registry, runs
from pipeline.tracking.listener import Observer, tell
from pipeline.tracking.runs import Target

LINE: tuple[tuple[type[Record], ModuleType], ...] = (
    (Tokens, tokenize),
    (Teacher, finetune),
    (TeacherCache, cache),
    (Student, distill),
    (Report, evaluate),
    (Package, pack),
    (ModelVersion, register),
)
BESIDE: tuple[tuple[type[Record], ModuleType], ...] = ((Sensitivity, sensitivity),)  # run for a budget alone
STAGES = tuple(kind.stage for kind, _ in LINE)
SHARED = STAGES[:3]  # by students of one teacher
REPAIRS = (Tokens.stage, TeacherCache.stage)  # stages that make single damaged shards again
SHIPS = ("scale_dtype", "rest_dtype", "positions")  # by freeze, so a change leaves training alone


@dataclass(frozen=True)
class Planned:
    """One step: done (it has a record) or to run, and why."""

    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    place: StepDir
    record: Any
    reason: str
    locations: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All steps of a run, in order, and what it takes."""

    config: Config
    steps: tuple[Planned, ...]
    rows: int
    rows_are_exact: bool
    parameters: int
    cache_bytes: int
    cache_reason: str
    shape: str

    @property
    def run_key(self) -> str:
        return self.steps[-1].place.key

    def step(self, stage: str) -> Planned:
        return next(step for step in self.steps if step.stage == stage)


def plan(config: Config, until: str = STAGES[-1]) -> Plan:
    """Resolve a configuration into keyed steps, without starting Ray.

    Raises:
        ConfigError: anything that cannot work, said before any worker starts.
    """
    if until not in STAGES:
        raise ConfigError(f"--until {until!r} is not a stage; valid: {', '.join(STAGES)}")
    try:
        return _Planner(config).plan(STAGES[: STAGES.index(until) + 1])
    except OSError as error:
        raise ConfigError(
            f"resources.storage_uri {config.resources.storage_uri!r} cannot be read: {error}. Set it to a directory, "
            "or to s3://bucket/prefix with credentials that allow it."
        ) from error


class _Planner:
    """Builds the steps one by one; each key needs the keys before it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.storage_uri = storage_uri(config.resources)
        self.scratch = scratch_dir(config.resources)
        self.inputs = preflight.inspect(config, self.scratch)
        self.task = self.inputs.task(config)
        self.steps: dict[str, Planned] = {}

    def plan(self, stages: tuple[str, ...]) -> Plan:
        config, text = self.config, self.inputs.text
        self._add(Tokens, *self._tokenize(), ())
        tokens: Tokens | None = self.steps[Tokens.stage].record
        width = self.task.states
        rows = tokens.splits["train"].rows if tokens else preflight.estimated_rows(config, self.task, text["train"])
        if tokens is None:
            preflight.check_length(config, self.inputs, self.steps[Tokens.stage].locations, self.scratch)
        self._add(Teacher, *self._finetune(), (Tokens,) if config.finetune is not None else ())
        mode, reason = self._cache(rows)
        self._distill_to_register()
        needed = cache.cache_bytes(rows, width, self.inputs.hidden, config.cache.dtype) if mode == "states" else 0
        steps = tuple(self.steps[stage] for stage in stages)
        if any(step.stage == TeacherCache.stage and step.record is None for step in steps):
            cache.check_space(self.steps[TeacherCache.stage].place, needed, rows * width)
        return Plan(config, steps, rows, tokens is not None, self.inputs.parameters, needed, reason, self.task.shape)

    def _tokenize(self) -> tuple[dict[str, Any], dict[str, Any]]:
        recipe = self.inputs.tokens_recipe(self.config)
        locations: dict[str, Any] = {
            split: [file.model_dump() for file in files] for split, files in self.inputs.text.items()
        }
        source = self.inputs.tokenizer
        if source is not None:
            locations["tokenizer"] = source.location()
        return recipe, locations

    def _finetune(self) -> tuple[dict[str, Any], dict[str, Any]]:
        section = self.config.finetune
        recipe = {
            "model": self.inputs.model_recipe(self.config),
            "finetune": recipe_of(section) if section is not None else None,
        }
        source = self.inputs.model
        return recipe, {"model": source.location() if source is not None else None}

    def _cache(self, rows: int) -> tuple[str, str]:
        """Add the cache step with its mode resolved; a mode already begun is kept."""
        section = self.config.cache
        inputs = (Tokens, Teacher)
        if section.mode != "auto":
            self._add(TeacherCache, self._cache_recipe(section.mode), {}, inputs)
            return section.mode, f"{section.mode}: as configured"
        if self.config.distill.compared_layer != LAST:
            self._add(TeacherCache, self._cache_recipe("online"), {}, inputs)
            return "online", "online: cached states are those of the last layer, and distill.contrast_layer is another"
        for mode in ("states", "online"):
            self._add(TeacherCache, self._cache_recipe(mode), {}, inputs)
            step = self.steps[TeacherCache.stage]
            if step.record is not None or step.place.sizes():
                return mode, f"{mode}: chosen before (auto)"
        mode, reason = preflight.cheaper_mode(
            section,
            self.config.distill,
            self.inputs,
            rows,
            self.task.states,
            self.config.resources.cache_gib_per_teacher_hour,
        )
        self._add(TeacherCache, self._cache_recipe(mode), {}, inputs)
        return mode, reason

    def _cache_recipe(self, mode: str) -> dict[str, Any]:
        return {"cache": recipe_of(self.config.cache) | {"mode": mode} if mode == "states" else {"mode": mode}}

    def _distill_to_register(self) -> None:
        config = self.config
        quant = recipe_of(config.quant)
        ship = {name: quant.pop(name) for name in SHIPS if name in quant}
        name = config.register_.name or config.name
        training = {"quant": quant, "distill": recipe_of(config.distill)}
        if config.quant.activation_range == "tensor":  # the only case in which the cut of a batch shows in the result
            resources = ("workers", "micro_batch", "inference_batch")
            training["batch"] = {name: getattr(config.resources, name) for name in resources}
        self._add(Student, training, {}, (Tokens, Teacher, TeacherCache))
        scoring: dict[str, Any] = {"ship": ship, "protocol": self.task.protocol, **self.task.scoring(config.evaluate)}
        if config.quant.activation_range == "tensor":
            scoring |= {"batch": config.resources.inference_batch, "cut": "shards"}
        self._add(Report, scoring, {}, (Tokens, Teacher, Student))
        encoding = {"ship": ship, "encoding": config.pack.encoding, "name": name}
        self._add(Package, encoding, {}, (Tokens, Teacher, Student, Report))
        recipe = {"name": name, "gate": recipe_of(config.register_.gate)}
        self._add(ModelVersion, recipe, {"tracking": self._tracking()}, (Teacher, Student, Report, Package))

    def _tracking(self) -> dict[str, Any]:
        config = self.config
        params = {
            "bits": config.quant.bits,
            "quantizer": config.quant.quantizer,
            "granularity": config.quant.granularity,
            "task": config.task.name,
            **{knob.removeprefix("task."): length for knob, length in self.task.positions.items()},
            "steps": f"{config.distill.epochs} epochs" if config.distill.steps is None else config.distill.steps,
            "batch_size": config.distill.batch_size,
            "lr": config.distill.lr,
            "optimizer": config.distill.optimizer,
            **({"muon_lr": config.distill.muon_lr} if config.distill.optimizer == "muon" else {}),
            "gamma_lr": config.distill.gamma_lr,
            "contrast_weight": config.distill.contrast_weight,
            "seed": config.distill.seed,
        }
        recipe = config.model_dump(mode="json", by_alias=True, exclude={"resources", "sweep"})
        uri = tracking_uri(config.resources)
        database = runs.sqlite_file(uri)
        return {
            "uri": uri,
            "artifacts": (database.parent / "mlflow-artifacts").as_uri() if database else None,
            "experiment": config.name,
            "bits": config.quant.bits,
            "params": params,
            "recipe": recipe,
        }

    def _add(
        self,
        kind: type[Record],
        recipe: dict[str, Any],
        locations: dict[str, Any],
        after: tuple[type[Record], ...],
    ) -> None:
        inputs = {earlier.stage: self.steps[earlier.stage].place.key for earlier in after}
        module = dict(LINE)[kind]
        key = step_key(kind.stage, module.VERSION, recipe, inputs)
        place = StepDir(self.storage_uri, kind.stage, key, self.scratch)
        record = place.record(kind)
        reason = "done before"
        if isinstance(record, ModelVersion) and not registry.registered(
            locations["tracking"]["uri"], record.name, record.key
        ):
            record, reason = None, f"the registry at {locations['tracking']['uri']} does not hold it"
        elif record is None:
            reason = self._why(kind, recipe, inputs)
        self.steps[kind.stage] = Planned(kind.stage, recipe, inputs, place, record, reason, locations)

    def _why(self, kind: type[Record], recipe: dict[str, Any], inputs: dict[str, str]) -> str:
        """What differs from the most similar step that was run before."""
        changed = [stage for stage in inputs if self.steps[stage].record is None]
        if changed:
            return f"follows {', '.join(changed)}"
        known = [differences(record.recipe, recipe) for record in records(self.storage_uri, kind)]
        nearest = min((lines for lines in known if lines), key=len, default=None)
        return "; ".join(nearest[:4]) if nearest else "never run before"


def target_of(plan: Plan, name: str, parent: str | None) -> Target:
    """The MLflow run of a planned run."""
    settings = plan.step(ModelVersion.stage).locations["tracking"]
    return Target(settings["uri"], settings["experiment"], settings["artifacts"], plan.run_key, name, parent)


@dataclass(frozen=True)
class Outcome:
    """What became of each step."""

    done: dict[str, Done]
    status: dict[str, str]
    seconds: dict[str, float]

    @property
    def worker_seconds(self) -> float:
        """Of the steps that ran, without waiting for other commands."""
        notes = [self.done[stage].record.provenance for stage, status in self.status.items() if status == "done"]
        return sum(float(note.get("seconds", 0)) * int(note.get("workers", 1)) for note in notes)


def run(plan: Plan, observer: Observer, wait: bool = True, engine: Engine | None = None) -> Outcome:
    """Run the steps that have no record; start Ray at most once, and only if something runs.

    `engine` may be given, and is left open; otherwise one is made of `config.resources`.

    Raises:
        BitmillError: what went wrong; what was committed is kept.
    """
    outcome = Outcome({}, {}, {})
    if all(step.record is not None for step in plan.steps):
        for step in plan.steps:
            _finish(outcome, step, Done(step.record, step.place), "reused", 0.0, observer)
        return outcome
    check_writable(storage_uri(plan.config.resources))
    if plan.steps[-1].stage == ModelVersion.stage:
        runs.connect(tracking_uri(plan.config.resources))
    used = engine or Engine(plan.config.resources)
    try:
        for step in plan.steps:
            start = time.perf_counter()
            record, status = step.record, "reused"
            if record is None:
                observer.started(step.stage)
                record, status = _run_or_repair(step, plan, outcome.done, used, observer, wait)
            _finish(outcome, step, Done(record, step.place), status, time.perf_counter() - start, observer)
    finally:
        if engine is None:
            used.close()
    return outcome


def _finish(outcome: Outcome, step: Planned, done: Done, status: str, seconds: float, observer: Observer) -> None:
    outcome.done[step.stage], outcome.status[step.stage], outcome.seconds[step.stage] = done, status, seconds
    observer.finished(step.stage, status, seconds)


def _run_or_repair(
    step: Planned, plan: Plan, done: dict[str, Done], engine: Engine, observer: Observer, wait: bool
) -> tuple[Record, str]:
    """Run a step; if it meets a damaged shard, make the shard again and run it once more."""
    try:
        return _run_step(step, done, engine, observer, wait)
    except DamagedError:
        damaged = [plan.step(stage) for stage in REPAIRS if stage in step.inputs]
        if not damaged:
            raise
        for earlier in damaged:
            _run_step(earlier, done, engine, observer, wait, repair=True)
        return _run_step(step, done, engine, observer, wait)


def _run_step(
    step: Planned, done: dict[str, Done], engine: Engine, observer: Observer, wait: bool, repair: bool = False
) -> tuple[Record, str]:
    kind, module = next((kind, module) for kind, module in LINE + BESIDE if kind.stage == step.stage)
    with step.place.hold(wait, lambda owner: observer.waiting(step.stage, owner)) as place:
        if step.stage == ModelVersion.stage:  # done only when the registry holds it; an older record says otherwise
            place.forget_record()
        record = None if repair else place.record(kind)
        if record is not None:  # another process finished it while we waited
            return record, "reused"
        begun = time.perf_counter()
        record = module.run(
            Step(
                version=module.VERSION,
                recipe=step.recipe,
                inputs={stage: done[stage] for stage in step.inputs},
                place=place,
                engine=engine,
                advance=partial(tell, observer, step.stage),
                locations=step.locations,
            )
        )
        if place.fence == 1:  # in one go, so that the time says what the step costs
            took = {"seconds": f"{time.perf_counter() - begun:.3f}", "workers": str(max(1, engine.resources.workers))}
            record = record.model_copy(update={"provenance": {**record.provenance, **took}})
        return place.commit(record), "done"
