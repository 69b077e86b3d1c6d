"""Students of a bench: each is the flow as far as `pack` with other values, run side by side on a pool of workers. A
run's steps are keyed like any other, so an interrupted bench goes on where it was."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

from pydantic import ValidationError

from jobs.bench.rows import Row
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


Key = tuple[str, str]  # a row, or a method of the paper, and its bits


class TrainedStep(Closed):
    """One row at one width, rate and seed."""

    row: str
    bits: str
    rate: float
    seed: int

    @property
    def key(self) -> Key:
        """Return the row and its bits, by which a table is filled."""
        return self.row, self.bits


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


class Score(TrainedStep):
    """The scores of a run on the test split, or why it failed."""

    digest: str  # of the run's configuration
    validation_nats: float | None  # None: it failed
    teacher: dict[str, float]
    student: dict[str, float]
    packed_bytes: int
    token_cosine: float
    measured: str  # date and kind of machine of the evaluation
    failure: str = ""

    @property
    def gap_nats(self) -> float:
        """Return the gap: log(student's perplexity / teacher's), nats."""
        return math.log(self.student["perplexity"] / self.teacher["perplexity"])


NOTHING: dict[str, Any] = {"validation_nats": None, "teacher": {}, "student": {}, "packed_bytes": 0}
NOTHING |= {"token_cosine": 0.0, "measured": ""}  # of a run that failed


def bench_run(base: Config, row: Row, bits: str, rate: float, seed: int) -> BenchRun:
    """Return the base configuration with the row's values, and the rate it is tried at, laid over it. Raises
    ConfigError if they do not go together."""
    fields = base.model_dump(mode="json", by_alias=True, exclude={"preset"})
    own: dict[str, dict[str, Any]] = {
        "quant": {"bits": bits, **SHIPPED},
        "distill": {row.rate_knob: rate, "seed": seed, **({} if row.trained else {"epochs": None})},
    }
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
    return BenchRun(row=row.name, bits=bits, rate=rate, seed=seed, config=fields)


def train_all(runs: Sequence[BenchRun], resources: Resources, display: Display, stage: str) -> list[Score]:
    """Run what has not been run, `resources.workers` at once, shown as `stage`; shared stages must be there already."""
    if not runs:
        return []
    display.started(stage)
    # Planned here, because workers have directories of their own, and need nothing but the store.
    plans = {run.digest: plan_run(Config.model_validate(run.config), Package.stage) for run in runs}
    engine = Engine(resources)
    try:
        work, advance = partial(partial, _train, plans), partial(display.advanced, stage)
        lines = engine.shards(work, runs, advance, gpus=resources.gpus_per_worker)
        scores = {(s.row, s.bits, s.rate, s.seed): s for s in map(Score.model_validate_json, lines)}
    finally:
        engine.close()
    return [scores[run.row, run.bits, run.rate, run.seed] for run in runs]


def _train(plans: Mapping[str, RunPlan], run: BenchRun) -> str:
    """Run one student in this process; returns its score, or why it failed."""
    try:
        return score(run, run_plan(plans[run.digest], SilentListener())).model_dump_json()
    except RunError as error:  # such as a rate at which the loss is not finite
        return Score(**_identity(run), **NOTHING, failure=str(error)).model_dump_json()


def _identity(run: BenchRun) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("row", "bits", "rate", "seed", "digest")}


def score(run: BenchRun, outcome: Outcome) -> Score:
    """Return what a run gave, from its finished steps."""
    student, evaluation = outcome.finished(Student).record, outcome.finished(Evaluation).record
    history = outcome.finished(Student).read_json("history.json")
    cosines = {e["step"]: e["token_cosine"] for e in history if "token_cosine" in e}
    return Score(
        **_identity(run),
        validation_nats=student.validation_nats,
        teacher=evaluation.teacher,
        student=evaluation.student,
        packed_bytes=outcome.finished(Package).record.size.packed_bytes,
        token_cosine=cosines[student.best_step],
        measured=", ".join(evaluation.provenance.get(name, "") for name in ("date", "machine")),
    )


def best_rates(scores: Iterable[Score]) -> dict[Key, float]:
    """Return by row and width the learning rate that is best on validation; none of a row that failed at every rate."""
    best: dict[Key, Score] = {}
    for score in scores:
        if not score.failure and (score.key not in best or _nats(score) < _nats(best[score.key])):
            best[score.key] = score
    return {key: score.rate for key, score in best.items()}


def _nats(score: Score) -> float:
    return math.inf if score.validation_nats is None else score.validation_nats
