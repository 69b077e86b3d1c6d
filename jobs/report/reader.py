"""From a store to what a report shows: a key names a sweep or the last step of a run, records name the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jobs.report import latency
from jobs.report.values import Content, Cost, Curve, Module, Shown
from pipeline.config.laid_over import label
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, DamagedError
from pipeline.flow.line import SHARED, STAGES
from pipeline.flow.lineage import Steps, steps_behind
from pipeline.metrics import gap_nats, measure_of
from pipeline.retrain.decisions import Decisions
from pipeline.retrain.ticks import TickLog
from pipeline.store.keys import KEY_DIGITS
from pipeline.store.records import Evaluation, ModelVersion, Package, Student, SweepRecord, Teacher, Tokens, Trial
from pipeline.store.step_store import FinishedStep, StepDir, records
from pipeline.sweep.queue import stored_trials

ENDS = (ModelVersion, Package, Evaluation)  # what a run may end with to be reported
OF_THE_TEACHER_ALONE = ("date", "machine", "seconds", "workers")
RECIPE_KNOBS = {
    "quant": ("bits", "quantizer", "granularity", "overrides"),
    "distill": ("steps", "epochs", "batch_size", "optimizer", "lr", "muon_lr", "contrast_weight", "seed"),
}
KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")
MOST_POINTS = 400  # of a curve


class Reader:
    """Reads the records of one store."""

    def __init__(self, storage_uri: str, scratch: str, local_cache_gib: float = Resources().local_cache_gib) -> None:
        self.storage_uri = storage_uri
        self.scratch = scratch
        self.local_cache_gib = local_cache_gib

    def content(self, key: str) -> Content:
        """Return what a report on a sweep or a run shows. Raises ConfigError if the store has neither of this key."""
        try:
            sound = KEY.fullmatch(key) is not None
            sweep = self._dir(SweepRecord.stage, key).record(SweepRecord) if sound else None
            if sweep is not None:
                return self._sweep(key, sweep.name, sweep.trials, sweep.objectives, frozenset(sweep.front))
            trials = tuple(stored_trials(self._dir(SweepRecord.stage, key)).values()) if sound else ()
            if trials:
                return self._sweep(key, "sweep, not finished", trials, (), None)
            for kind in ENDS:
                if sound and self._dir(kind.stage, key).record(kind) is not None:
                    return self._run(key, kind.stage)
        except OSError as error:
            raise ConfigError(f"The store {self.storage_uri!r} cannot be read: {error}") from error
        raise ConfigError(
            f"KEY is {key!r}, and the store {self.storage_uri} has no sweep or finished run of that key. It has: "
            f"{'; '.join(self._known()) or 'none'}. Set --storage-uri to another store."
        )

    def packages(self, content: Content) -> list[tuple[str, FinishedStep[Package]]]:
        """Return the packages of the models that a report shows, after their labels."""
        keys = {model.package_key: model.label for model in content.shown if model.package_key}
        steps = {key: self.steps({Package.stage: key}).get(Package.stage) for key in keys}
        return [(keys[key], step) for key, step in steps.items() if step is not None]

    def _known(self) -> list[str]:
        sweeps = [f"{record.key} (sweep {record.name})" for record in records(self.storage_uri, SweepRecord)]
        runs = [f"{r.key} ({r.name} version {r.version})" for r in records(self.storage_uri, ModelVersion)]
        return [*sweeps[-5:], *runs[-5:]]

    def _dir(self, stage: str, key: str) -> StepDir:
        return StepDir(self.storage_uri, stage, key, self.scratch, local_cache_gib=self.local_cache_gib)

    def steps(self, keys: dict[str, str]) -> Steps:
        """Return finished steps by stage, from the keys of some of them; each record names its inputs."""
        return steps_behind(self._dir, keys)

    def _run(self, key: str, stage: str) -> Content:
        steps = self.steps({stage: key})
        if not {Student.stage, Teacher.stage, Tokens.stage} <= steps.keys():
            raise ConfigError(
                f"KEY is {key!r}, and what made that run is not, or no longer, in the store {self.storage_uri}: "
                "`bitmill gc` keeps its package and scores alone. `bitmill compress` with its configuration makes the "
                "rest again."
            )
        student: Student = steps[Student.stage].record
        quant, name = student.recipe["quant"], "run"
        model = shown(key, f"{quant['bits']} {quant['quantizer']}", quant["bits"], "done", steps)
        if ModelVersion.stage in steps:
            version: ModelVersion = steps[ModelVersion.stage].record
            name = version.name
            model = replace(model, version=f"{name}/{version.version}", aliases=version.aliases)
        told = content(f"{name} at {quant['bits']}", "run", key, [model], steps)
        if not model.version:
            return told
        kept = Decisions(name, self.storage_uri, "")
        return replace(told, decisions=tuple(kept.all())[::-1], ticks=tuple(TickLog(kept).all()))

    def _sweep(
        self, key: str, name: str, trials: Sequence[Trial], objectives: Sequence[str], chosen: frozenset[str] | None
    ) -> Content:
        """Return what a report on a sweep shows. The picture shows the first objective beside bytes: the gap as
        perplexity, of several teachers as it is."""
        steps = [self.steps({**trial.step_keys, ModelVersion.stage: trial.key}) for trial in trials]
        shared: Steps = {stage: step for each in reversed(steps) for stage, step in each.items()}
        if Teacher.stage not in shared:
            raise ConfigError(f"KEY is {key!r}, and the store has no steps of its trials.")
        made = {step.dir.key: step for each in steps for name, step in each.items() if name in SHARED}
        alone = sum(isinstance(step.record, Teacher) for step in made.values()) == 1
        models = [of_trial(trial, each, not alone) for trial, each in zip(trials, steps, strict=True)]
        measure = next((objective for objective in objectives if objective != "bytes"), "gap")
        whole = content(name, "sweep", key, models, shared)
        return replace(
            whole,
            measure="perplexity" if measure == "gap" and alone else measure,
            shared_costs=costs(made.values()),
            teacher=whole.teacher if alone else {},
            teacher_validation=whole.teacher_validation if alone else {},
            chosen=chosen,
        )


def of_trial(trial: Trial, steps: Steps, gap: bool) -> Shown:
    """Return a trial of a sweep, as far as it came; `gap` adds the nats between its student and its own teacher."""
    model = shown(trial.key, label(trial.values), trial.bits, trial.status, steps)
    size, version = trial.size, trial.version or {}
    metrics, validation = dict(trial.student) or model.metrics, trial.validation.get("student") or model.validation
    if gap and trial.student:
        metrics = {"gap": gap_nats(trial.teacher, trial.student)} | metrics
        validation = {"gap": gap_nats(**trial.validation)} | validation
    return replace(
        model,
        recipe={**model.recipe, **{path.rpartition(".")[2]: value for path, value in trial.values.items()}},
        metrics=metrics,
        validation=validation,
        packed_bytes=size.packed_bytes if size is not None else model.packed_bytes,
        ratio=size.ratio if size is not None else model.ratio,
        version=f"{version['name']}/{version['version']}" if version else "",
        aliases=tuple(version.get("aliases", ())),
        costs=model.costs or (Cost("trial", trial.seconds, trial.workers),),
        failure=trial.failure,
    )


def shown(key: str, name: str, bits: str, status: str, steps: Steps) -> Shown:
    """Return what the steps of one student say."""
    model = Shown(key, name, bits, {}, status)
    if Student.stage in steps:
        student = steps[Student.stage]
        model = replace(model, recipe=compared_knobs(student.record), curve=curve(_json(student, "history.json")))
    if Evaluation.stage in steps:
        evaluation: Evaluation = steps[Evaluation.stage].record
        model = replace(model, metrics=evaluation.student, validation=evaluation.validation["student"])
        model = replace(model, suites=_json(steps[Evaluation.stage], Evaluation.SUITES) or {})
    if Package.stage in steps:
        package = steps[Package.stage]
        size, uri = package.record.size, package.folder_uri
        model = replace(model, packed_bytes=size.packed_bytes, ratio=size.ratio, package_uri=uri)
        model = replace(model, package_key=package.dir.key, modules=modules(steps), latency=latency.measured(package))
    return replace(model, costs=costs(step for name, step in steps.items() if name not in SHARED))


def content(title: str, kind: str, key: str, models: list[Shown], steps: Steps) -> Content:
    """Return a report on models of one teacher; `steps` has what they share."""
    teacher: Teacher = steps[Teacher.stage].record
    task = steps[Tokens.stage].record.recipe["task"]["name"]
    evaluation: Evaluation | None = steps[Evaluation.stage].record if Evaluation.stage in steps else None
    return Content(
        title=title,
        kind=kind,
        key=key,
        measure=measure_of(task),
        protocol=evaluation.protocol if evaluation is not None else "",
        teacher_bytes=teacher.fp32_bytes,
        teacher_parameters=teacher.parameters,
        teacher=evaluation.teacher if evaluation is not None else {},
        teacher_validation=evaluation.validation["teacher"] if evaluation is not None else {},
        shown=tuple(models),
        shared_costs=costs(steps[stage] for stage in SHARED if stage in steps),
        provenance={k: v for k, v in teacher.provenance.items() if k not in OF_THE_TEACHER_ALONE},
    )


def compared_knobs(student: Student) -> dict[str, Any]:
    """Return the knobs that people compare, where they are set."""
    recipe = {knob: student.recipe[section].get(knob) for section, knobs in RECIPE_KNOBS.items() for knob in knobs}
    if recipe["optimizer"] != "muon":
        recipe["muon_lr"] = None
    return {knob: value for knob, value in recipe.items() if value not in (None, {})}


def costs(steps: Iterable[FinishedStep[Any]]) -> tuple[Cost, ...]:
    """Return what steps took, as their records note it."""
    made = [(step.record.stage, step.record.provenance) for step in steps]
    made.sort(key=lambda step: list(STAGES).index(step[0]))
    return tuple(
        Cost(stage, float(notes["seconds"]) if "seconds" in notes else None, int(notes.get("workers", 1)))
        for stage, notes in made
    )


def curve(history: Any) -> Curve:
    """Return losses from the history that the trainer wrote."""
    points = history or []
    train, validation = (
        [(int(p["step"]), float(p[name])) for p in points if name in p] for name in ("loss", "validation_nats")
    )
    return Curve(tuple(train[:: max(1, -(-len(train) // MOST_POINTS))]), tuple(validation))


def modules(steps: Steps) -> tuple[Module, ...]:
    """Return the modules: bits from the package, gamma and zeros from what the trainer saw last."""
    config = _json(steps[Package.stage], f"{Package.FOLDER}config.json") or {}
    looks = _json(steps[Student.stage], "modules.json") if Student.stage in steps else None
    last = looks[-1]["modules"] if looks else {}
    return tuple(
        Module(
            name=name,
            bits=int(facts["bits"]),
            weights=int(facts["shape"][0]) * int(facts["shape"][1]),
            gamma=last.get(name, {}).get("gamma"),
            zeros=last.get(name, {}).get("zeros"),
        )
        for name, facts in config.get("quantization_config", {}).get("modules", {}).items()
    )


def _json(step: FinishedStep[Any], name: str) -> Any:
    """Return a JSON file of a step, or None if it has none or it is damaged: a report shows what there is."""
    try:
        return step.read_json(name)
    except (DamagedError, ValueError):
        return None
