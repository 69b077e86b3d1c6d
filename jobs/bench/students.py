"""Students of a bench: each is the flow as far as `pack` with other values, run side by side on a pool of workers. A
run's steps are keyed like any other, so an interrupted bench goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from jobs.bench.documents import Documents
from jobs.bench.rows import Key, Row, Try
from jobs.display import Display
from pipeline.config.base import Closed
from pipeline.config.load import explain
from pipeline.config.presets import suited
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.execution.engine import Engine
from pipeline.flow.plan import RunPlan, plan_run
from pipeline.flow.run import Outcome, run_plan
from pipeline.store.keys import canonical_json, recipe_of
from pipeline.store.locations import anchored
from pipeline.store.records import Evaluation, Package, Student
from pipeline.tracking.listener import SilentListener

S = TypeVar("S", bound="Tried")

# What the base decides for all rows; the rest is each row's own, or the default.
COMMON = {
    "quant": ("activation_range", "attention", "overrides"),
    "distill": ("steps", "epochs", "batch_size", "warmup_steps", "precision", "eval_every", "eval_rows"),
    "pack": (),
}
IN_PROCESS: dict[str, Any] = {"workers": 0}
# Methods are compared, not how the rest is stored: every row ships it in fp32.
SHIPPED = {"scale_dtype": "float32", "rest_dtype": "float32", "positions": None}


def refuse_decided(overrides: Sequence[str], options: Mapping[str, str], own: Set[str] = frozenset()) -> None:
    """Raise ConfigError for a `--set` that each row decides itself, so that it would have no effect. `options` has the
    paths that an option of the command decides, and which; `own` has paths that the command takes from the base beside
    those of `COMMON`."""
    base = {f"{section}.{knob}" for section, knobs in COMMON.items() for knob in knobs} | own
    for override in overrides:
        path = override.partition("=")[0]
        decided = next((name for name in options if name == path or name.startswith(f"{path}.")), None)
        if decided is not None:
            raise ConfigError(f"--set {path} has no effect here: {options[decided]} decides {decided}.")
        if path.partition(".")[0] in (*COMMON, "preset") and path not in base:
            valid = ", ".join(sorted(base - set(options)))
            raise ConfigError(
                f"--set {path} has no effect here: each row of the bench has its own. Of these sections a base decides "
                f"{valid}."
            )


class TrainedStep(Closed):
    """One row at one width, rate, weight of the contrastive loss and seed."""

    row: str
    bits: str
    rate: float
    contrast_weight: float
    seed: int

    @property
    def key(self) -> Key:
        """Return the row and its bits, by which a table is filled."""
        return self.row, self.bits

    @property
    def tried(self) -> Try:
        """Return what a search varies of it."""
        return Try(self.rate, self.contrast_weight)


class BenchRun(TrainedStep):
    """A student to train; `config` is a whole configuration."""

    config: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return a hash of the configuration with its defaults, without what does not change the answer: a score
        belongs to one of them. Versions of the stages are no part of it, as they are of the steps' keys, and sources
        are no part by name: the teacher's own score tells them apart, wherever they lie."""
        recipe = recipe_of(Config.model_validate(self.config))
        del recipe["resources"]
        for section, names in (("model", ("source", "tokenizer")), ("data", ("source", "validation", "test"))):
            recipe[section] = {name: value for name, value in recipe[section].items() if name not in names}
        return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]


class Tried(TrainedStep):
    """What a run of the search gave: how good its student is on validation, or why there is none."""

    digest: str  # of the run's configuration
    validation_nats: float | None = None  # None: it failed
    failure: str = ""


class Score(Tried):
    """The scores of a run on the test split, or why it failed."""

    teacher: dict[str, float] = {}
    student: dict[str, float] = {}
    packed_bytes: int = 0
    token_cosine: float = 0.0
    measured: str = ""  # date and kind of machine of the evaluation
    documents: Documents | None = None  # of the test split

    @property
    def gap_nats(self) -> float:
        """Return the gap: log(student's perplexity / teacher's), nats."""
        return math.log(self.student["perplexity"] / self.teacher["perplexity"])


def bench_run(base: Config, row: Row, bits: str, tried: Try, seed: int) -> BenchRun:
    """Return the base configuration with the row's values, and those it is tried at, laid over it. Raises ConfigError
    if they do not go together."""
    fields = base.model_dump(mode="json", by_alias=True, exclude={"preset"})
    own: dict[str, dict[str, Any]] = {
        "quant": {"bits": bits, **SHIPPED},
        "distill": {row.rate_knob: tried.rate, "contrast_weight": tried.contrast_weight, "seed": seed},
    }
    if not row.trained:
        own["distill"]["epochs"] = None
    sections = suited(row.sections, bits, base.task.name)
    for name, values in own.items():
        common = {key: fields[name][key] for key in COMMON[name]}
        fields[name] = {**common, **sections.get(name, {}), **values}
    fields["resources"] = {**anchored(base.resources).model_dump(mode="json"), **IN_PROCESS}
    try:
        # The smallest encoding that holds the levels, so that bytes are compared at their best.
        fields["pack"] = {"encoding": "base3" if Quant.model_validate(fields["quant"]).ternary else "dense"}
        Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("\n".join([f"The row {row.name!r} cannot be at {bits}.", *explain(error)])) from error
    return BenchRun(row=row.name, bits=bits, **tried._asdict(), seed=seed, config=fields)


def train_all(runs: Sequence[BenchRun], of: type[S], resources: Resources, display: Display, stage: str) -> list[S]:
    """Run what has not been run, `resources.workers` at once, shown as `stage`; shared stages must be there already.
    For a `Tried` students are trained, for a `Score` they are scored and packed too. Rows that come to the same student
    share it."""
    distinct = {run.digest: run for run in runs}
    if not distinct:
        return []
    display.started(stage)
    until = Package.stage if of is Score else Student.stage
    # Planned here, because workers have directories of their own, and need nothing but the store.
    plans = {digest: plan_run(Config.model_validate(run.config), until) for digest, run in distinct.items()}
    advance = partial(display.advanced, stage)
    with contextlib.closing(Engine(resources)) as engine, engine.relayed(partial(display.noted, stage)) as say:
        work = partial(partial, _train, plans, of, say)
        lines = engine.shards(work, list(distinct.values()), advance, gpus=resources.gpus_per_worker)
        given = {tried.digest: tried for tried in map(of.model_validate_json, lines)}
    return [given[run.digest].model_copy(update=_identity(run)) for run in runs]


def _train(plans: Mapping[str, RunPlan], of: type[Tried], say: Callable[[str], None], run: BenchRun) -> str:
    """Run one student in this process; returns what it gave, or why it failed."""
    try:
        outcome = run_plan(plans[run.digest], StudentListener(run, say))
    except RunError as error:  # such as a rate at which the loss is not finite
        return of(**_identity(run), failure=str(error)).model_dump_json()
    facts = facts_of(outcome) if of is Score else {}
    nats = outcome.finished(Student).record.validation_nats
    return of(**_identity(run), validation_nats=nats, **facts).model_dump_json()


class StudentListener(SilentListener):
    """A listener that says how a student gets on, at each quarter of a stage."""

    def __init__(self, run: BenchRun, say: Callable[[str], None]) -> None:
        tried = f"rate {run.rate:g}, contrast {run.contrast_weight:g}, seed {run.seed}"
        self._name, self._say = f"{run.row} at {run.bits}, {tried}", say
        self._said: tuple[str, int] = "", 0

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        """Say how far the stage is."""
        quarter = stage, 4 * done // max(1, total)
        if quarter != self._said:
            self._said = quarter
            self._say(f"{self._name}: {stage} {done}/{total}{', ' + note if note else ''}")


def _identity(run: BenchRun) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("row", "bits", "rate", "contrast_weight", "seed", "digest")}


def facts_of(outcome: Outcome) -> dict[str, Any]:
    """Return what a `Score` says of a run, from its finished steps."""
    student, evaluation = outcome.finished(Student), outcome.finished(Evaluation)
    cosines = {e["step"]: e["token_cosine"] for e in student.read_json("history.json") if "token_cosine" in e}
    return {
        "teacher": evaluation.record.teacher,
        "student": evaluation.record.student,
        "packed_bytes": outcome.finished(Package).record.size.packed_bytes,
        "token_cosine": cosines[student.record.best_step],
        "measured": ", ".join(evaluation.record.provenance.get(name, "") for name in ("date", "machine")),
        "documents": evaluation.read_json(Evaluation.DOCUMENTS),
    }


def best_tries(searched: Iterable[Tried]) -> dict[Key, Try]:
    """Return by row and width what is best on validation; nothing of a row that failed at every try."""
    best: dict[Key, Tried] = {}
    for tried in searched:
        if not tried.failure and (tried.key not in best or _nats(tried) < _nats(best[tried.key])):
            best[tried.key] = tried
    return {key: tried.tried for key, tried in best.items()}


def _nats(tried: Tried) -> float:
    return math.inf if tried.validation_nats is None else tried.validation_nats
