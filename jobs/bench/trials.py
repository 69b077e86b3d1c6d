"""Trials of a bench: each is the flow as far as `pack` with other values, run side by side on a pool of workers.

A trial's steps are keyed like any other, so an interrupted bench goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from pydantic import ValidationError

from jobs.bench.rows import Row
from pipeline.config.base import Closed
from pipeline.config.load import explain
from pipeline.config.presets import suited
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.execution.engine import Engine
from pipeline.flow import run as flow
from pipeline.stages.stage import Done
from pipeline.store.keys import canonical_json, recipe_of
from pipeline.store.locations import anchored
from pipeline.store.records import Advance, Package, Report, Student
from pipeline.tracking.listener import Silent

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
    """Raises ConfigError for a `--set` that each row decides itself, so that it would have no effect.

    Args:
        options: the paths that an option of the command decides, and which.
        own: paths that the command takes from the base beside those of `COMMON`.
    """
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


class Trial(Closed):
    """One row at one width, rate and seed; `config` is a whole configuration."""

    row: str
    bits: str
    rate: float
    seed: int
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the configuration with its defaults, without what does not change the answer: a score belongs to one of
        them. Versions of the stages are no part of it, as they are of the steps' keys."""
        recipe = recipe_of(Config.model_validate(self.config))
        del recipe["resources"]
        return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]


class Score(Closed):
    """What a trial gave on the test split, or why it failed. The gap is log(student's perplexity / teacher's), nats."""

    row: str
    bits: str
    rate: float
    seed: int
    digest: str  # of the trial's configuration
    validation_nats: float | None  # None: it failed
    teacher: dict[str, float]
    student: dict[str, float]
    packed_bytes: int
    token_cosine: float
    measured: str  # date and kind of machine of the evaluation
    failure: str = ""

    @property
    def gap_nats(self) -> float:
        return math.log(self.student["perplexity"] / self.teacher["perplexity"])


def trial(base: Config, row: Row, bits: str, rate: float, seed: int) -> Trial:
    """The base configuration with the row's values, and the rate it is tried at, laid over it.

    Raises:
        ConfigError: they do not go together.
    """
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
    return Trial(row=row.name, bits=bits, rate=rate, seed=seed, config=fields)


def run_trials(trials: Sequence[Trial], resources: Resources, advance: Advance) -> list[Score]:
    """Run what has not been run, `resources.workers` at a time; shared stages must be there already."""
    # Planned here, because workers have directories of their own, and need nothing but the store.
    plans = {trial.digest: flow.plan(Config.model_validate(trial.config), Package.stage) for trial in trials}
    engine = Engine(resources)
    try:
        lines = engine.shards(RunTrial, {"plans": plans}, trials, advance, gpus=resources.gpus_per_worker)
        found = {(s.row, s.bits, s.rate, s.seed): s for s in map(Score.model_validate_json, lines)}
    finally:
        engine.close()
    return [found[t.row, t.bits, t.rate, t.seed] for t in trials]


class RunTrial:
    """Runs one trial at a time, in this process."""

    def __init__(self, plans: Mapping[str, flow.Plan]) -> None:
        self.plans = plans

    def __call__(self, trial: Trial) -> str:
        try:
            outcome = flow.run(self.plans[trial.digest], Silent())
        except RunError as error:  # such as a rate at which the loss is not finite
            return failed(trial, str(error)).model_dump_json()
        return score(trial, outcome.done).model_dump_json()


def score(trial: Trial, done: dict[str, Done]) -> Score:
    student: Student = done[Student.stage].record
    report: Report = done[Report.stage].record
    package: Package = done[Package.stage].record
    history = done[Student.stage].place.local("history.json", student.files["history.json"])
    cosines = {e["step"]: e["token_cosine"] for e in json.loads(history.read_text()) if "token_cosine" in e}
    return Score(
        **{name: getattr(trial, name) for name in ("row", "bits", "rate", "seed", "digest")},
        validation_nats=student.validation_nats,
        teacher=report.teacher,
        student=report.student,
        packed_bytes=package.size.packed_bytes,
        token_cosine=cosines[student.best_step],
        measured=", ".join(report.provenance.get(name, "") for name in ("date", "machine")),
    )


def failed(trial: Trial, message: str) -> Score:
    return Score(
        **{name: getattr(trial, name) for name in ("row", "bits", "rate", "seed", "digest")},
        validation_nats=None,
        teacher={},
        student={},
        packed_bytes=0,
        token_cosine=0.0,
        measured="",
        failure=message,
    )


def best_rates(scores: Iterable[Score]) -> dict[tuple[str, str], float]:
    """By row and width, the learning rate that is best on validation; none of a row that failed at every rate."""
    best: dict[tuple[str, str], Score] = {}
    for found in scores:
        key = (found.row, found.bits)
        if not found.failure and (key not in best or _nats(found) < _nats(best[key])):
            best[key] = found
    return {key: found.rate for key, found in best.items()}


def _nats(score: Score) -> float:
    return math.inf if score.validation_nats is None else score.validation_nats
