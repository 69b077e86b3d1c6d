"""What a configuration comes to: keyed steps, each done or to run. Nothing is started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow import preflight, warm_start
from pipeline.flow.line import LINE, line_to
from pipeline.stages import register
from pipeline.stages.cache import cache_bytes, decide_mode
from pipeline.stages.evaluate import told_of_suites
from pipeline.stages.stage import PinnedRun, Stage, Start
from pipeline.store.keys import differences, step_key
from pipeline.store.locations import scratch_dir, storage_uri
from pipeline.store.records import Evaluation, ModelVersion, Overlap, Record, Student, Teacher, TeacherCache, Tokens
from pipeline.store.step_store import StepDir, records
from pipeline.tracking import registry
from pipeline.tracking.runs import Target

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedStep:
    """One step: done (it has a record) or to run."""

    stage: Stage[Any]
    recipe: dict[str, Any]
    inputs: dict[str, str]
    dir: StepDir
    record: Any
    locations: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the stage."""
        return self.stage.name

    @property
    def key(self) -> str:
        """Return the step's key."""
        return self.dir.key


@dataclass(frozen=True)
class RunPlan:
    """All steps of a run, in order, and what it takes; what is not known yet is estimated."""

    config: Config
    pinned: PinnedRun
    steps: tuple[PlannedStep, ...]
    parameters: int
    overlap: Overlap | None = None  # of the splits; None: not known before the text is read
    notes: tuple[str, ...] = ()  # on the checkpoint

    @property
    def tokens(self) -> Tokens | None:
        """Return the record of the rows, if they are there."""
        record: Tokens | None = self.step(Tokens).record
        return record

    @property
    def rows(self) -> int:
        """Return how many rows of training text there are."""
        return self.tokens.splits["train"].rows if self.tokens else self.pinned.estimated_rows

    def fill(self, tokens: Tokens | None) -> float | None:
        """Return which share of the positions of training rows hold a token; None: the rows are not there yet."""
        split = tokens.splits["train"] if tokens is not None else None
        return None if split is None else split.tokens / (split.rows * self.pinned.task.row_tokens)

    @property
    def cache_mode(self) -> tuple[str, str]:
        """Return what of the teacher is cached, and why."""
        return decide_mode(self.pinned)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of what is cached."""
        return cache_bytes(self.pinned, self.cache_mode[0], self.rows)

    @property
    def run_key(self) -> str:
        """Return the key of the last step, which names the run."""
        return self.last.key

    @property
    def last(self) -> PlannedStep:
        """Return the step that the run ends with."""
        return self.steps[-1]

    @property
    def left(self) -> list[PlannedStep]:
        """Return the steps that are to run."""
        return [step for step in self.steps if step.record is None]

    @property
    def warnings(self) -> list[str]:
        """Return what will work and is not what one would expect of this machine, each with its knob."""
        return [*self.notes, *preflight.warnings(self.config, {step.stage.record for step in self.left})]

    def step(self, kind: type[Record]) -> PlannedStep:
        """Return the step that makes a kind of record."""
        return next(step for step in self.steps if step.stage.record is kind)

    def ends_with(self, kind: type[Record]) -> bool:
        """Tell whether the last step makes this kind of record."""
        return self.last.stage.record is kind


class Once:
    """Remembers what was looked at, so that plans that are made in one go, perhaps `many`, look at it once."""

    def __init__(self, many: bool = True) -> None:
        self.many = many
        self._seen: dict[Hashable, Any] = {}

    def __call__(self, what: Hashable, look: Callable[[], T]) -> T:
        """Return what `look` returns, or returned before for the same `what`. What it raises is not remembered."""
        if what not in self._seen:
            self._seen[what] = look()
        seen: T = self._seen[what]
        return seen


def plan_run(config: Config, until: str = ModelVersion.stage, once: Once | None = None) -> RunPlan:
    """Resolve a configuration into keyed steps, without starting Ray. Plans that are given the same `once` share their
    looks at sources, models, the store and the registry. The plan's own configuration names by its version what a
    student starts from, so that an alias which moves meanwhile changes nothing.

    Raises:
        ConfigError: anything that cannot work, said before any worker starts.
    """
    look = once or Once(many=False)
    with _store_explained(config):
        run, start, steps = _plan_steps(config, until, look)
        config, pinned = run.config, _pinned(config)
        left = [step for step in steps.values() if step.record is None]
        teacher: Teacher | None = steps[Teacher.stage].record if Teacher.stage in steps else None
        notes, told = list[str](), list[str]()
        if teacher is not None and not left:
            parameters = teacher.parameters
        else:
            model = look(("model", pinned), partial(preflight.model_of, run))
            parameters = preflight.inspect(run, model)
            told = preflight.told_of_family(model, run.family)
            told += preflight.told_of_packing(run, model) + preflight.told_of_lengths(run, model)
            if teacher is None:  # one that is there was loaded
                notes = look(("checkpoint", pinned), partial(preflight.check_checkpoint, run, model))
            if start is not None and Student.stage in {step.name for step in left}:
                described = ("start fits", start, pinned)
                rows = steps[Tokens.stage]
                student = look(described, partial(warm_start.check, run, start, model.config, rows.dir, rows.record))
                warm_start.check_quantization(run, start, student)
        tokens: Tokens | None = steps[Tokens.stage].record
        checked = [look(("check", step.dir), partial(step.stage.check, run, step.dir, tokens)) for step in left]
        if Evaluation.stage in steps:
            told += told_of_suites(steps[Evaluation.stage].recipe)
        overlap = tokens.overlap if tokens is not None else next(filter(None, checked), None)
    return RunPlan(config, run, tuple(steps.values()), parameters, overlap, (*told, *notes))


def key_of_run(config: Config, once: Once) -> str:
    """Return the key of the run of a configuration, without a look at whether the run can work. Raises ConfigError."""
    with _store_explained(config):
        return [*_plan_steps(config, ModelVersion.stage, once)[2].values()][-1].key


def _pinned(config: Config) -> str:
    """Return what the sources of a run are a function of."""
    return config.model_dump_json(include={"model", "data", "task", "resources"})


def _plan_steps(config: Config, until: str, look: Once) -> tuple[PinnedRun, Start | None, dict[str, PlannedStep]]:
    """Return the sources, what the student starts from, and the steps, by stage. Raises ConfigError."""
    names = [stage.name for stage in LINE]
    if until not in names:
        raise ConfigError(f"--until {until!r} is not a stage; valid: {', '.join(names)}")
    pinned, start = _pinned(config), None
    if config.distill.start is not None and names.index(until) >= names.index(Student.stage):
        start = find_start(config, config.distill.start, look)
        config = warm_start.named(config, start.version)
    run = look(("sources", pinned), partial(preflight.pin, config)).with_config(config, start)
    steps: dict[str, PlannedStep] = {}
    for stage in line_to(until):
        plan = partial(plan_step, stage, run, steps, look)
        # That of the text, which may be of many files, is the same for all that pinned the same.
        steps[stage.name] = look(("tokens", pinned), plan) if stage.record is Tokens else plan()
    return run, start, steps


def find_start(config: Config, model: str, once: Once) -> Start:
    """Return the version that `name@alias` or `name/version` means, looked up once. Raises as `warm_start.find`."""
    where = config.resources.model_dump_json()
    start = once(("start", where, model), partial(warm_start.find, config, model))
    return once(("start", where, start.version), lambda: start)


@contextlib.contextmanager
def _store_explained(config: Config) -> Iterator[None]:
    """Turn what a store that cannot be read raises into ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"resources.storage_uri {config.resources.storage_uri!r} cannot be read: {error}. Set it to a directory, "
            "or to s3://bucket/prefix with credentials that allow it."
        ) from error


def plan_step(
    stage: Stage[Any], run: PinnedRun, earlier: Mapping[str, PlannedStep], once: Once | None = None
) -> PlannedStep:
    """Return one step, after those that it reads."""
    resources = run.config.resources
    recipe, locations = stage.recipe(run), stage.locations(run)
    inputs = {kind.stage: earlier[kind.stage].key for kind in stage.inputs(run)}
    key = step_key(stage.name, stage.version, recipe, inputs)
    step_dir = StepDir(
        storage_uri(resources), stage.name, key, scratch_dir(resources), local_cache_gib=resources.local_cache_gib
    )
    once = once or Once(many=False)
    record = once(("record", step_dir), partial(step_dir.record, stage.record))
    if isinstance(record, ModelVersion) and not _registered(record, locations["uri"], once):
        record = None
    return PlannedStep(stage, recipe, inputs, step_dir, record, locations)


def _registered(record: ModelVersion, uri: str, once: Once) -> bool:
    """Tell whether a registry holds a version: one plan asks for it by its key, many for all keys of its name."""
    if not once.many:
        return registry.registered(uri, record.name, record.key)
    return record.key in once(("registry", uri, record.name), partial(registry.held_keys, uri, record.name))


def reasons(plan: RunPlan) -> dict[str, str]:
    """Return for each step why it runs or does not, for people; asks the store for one listing at most a step whose
    inputs are done."""
    explained = {}
    missing = {step.name for step in plan.left}
    for step in plan.steps:
        if step.record is not None:
            explained[step.name] = "done before"
        elif step.stage.record is ModelVersion and step.dir.record(ModelVersion) is not None:
            explained[step.name] = f"the registry at {step.locations['uri']} does not hold it"
        elif changed := [name for name in step.inputs if name in missing]:
            explained[step.name] = f"follows {', '.join(changed)}"
        else:
            with _store_explained(plan.config):
                explained[step.name] = _nearest(step)
    return explained


def _nearest(step: PlannedStep) -> str:
    """Return what differs from the most similar step that was run before."""
    known = [differences(record.recipe, step.recipe) for record in records(step.dir.storage_uri, step.stage.record)]
    nearest = min((lines for lines in known if lines), key=len, default=None)
    return "; ".join(nearest[:4]) if nearest else "never run before"


def target_of(plan: RunPlan, name: str, parent: str | None) -> Target:
    """Return the MLflow run of a planned run."""
    return register.target_at(plan.step(ModelVersion).locations, plan.run_key, name, parent)


def plan_beside(stage: Stage[Any], config: Config) -> RunPlan:
    """Return the line as far as the cache, and after it a stage that stands beside the line."""
    line = plan_run(config, TeacherCache.stage)
    return replace(line, steps=(*line.steps, plan_step(stage, line.pinned, {step.name: step for step in line.steps})))
