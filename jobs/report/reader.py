"""From a store to what a report shows: a key names a sweep or the last step of a run, records name the rest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jobs.report import latency
from jobs.report.values import Content, Cost, Curve, Module, Shown
from pipeline.errors import ConfigError, DamagedError
from pipeline.flow.run import SHARED
from pipeline.store.keys import KEY_DIGITS
from pipeline.store.records import (
    ModelVersion,
    Package,
    Record,
    Report,
    Student,
    SweepRecord,
    Teacher,
    TeacherCache,
    Tokens,
    Trial,
)
from pipeline.store.step_store import StepDir, records
from pipeline.sweep.queue import stored_trials
from pipeline.sweep.trials import label

KINDS: dict[str, type[Record]] = {
    kind.stage: kind for kind in (Tokens, Teacher, TeacherCache, Student, Report, Package, ModelVersion)
}
ENDS = (ModelVersion, Package, Report)  # what a run may end with to be reported
MEASURES = {"summarization": "rougeL", "next_utterance": "accuracy"}
OF_THE_TEACHER_ALONE = ("date", "machine", "seconds", "workers")
RECIPE_KNOBS = {
    "quant": ("bits", "quantizer", "granularity", "overrides"),
    "distill": ("steps", "epochs", "batch_size", "optimizer", "lr", "muon_lr", "contrast_weight", "seed"),
}
KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")
MOST_POINTS = 400  # of a curve
Steps = dict[str, tuple[Any, StepDir]]  # records and where their files lie, by stage


class Reader:
    """Reads the records of one store."""

    def __init__(self, storage_uri: str, scratch: str) -> None:
        self.storage_uri = storage_uri
        self.scratch = scratch

    def content(self, key: str) -> Content:
        """What a report on a sweep or a run shows.

        Raises:
            ConfigError: the store has neither under this key.
        """
        try:
            sound = KEY.fullmatch(key) is not None
            sweep = self._place(SweepRecord.stage, key).record(SweepRecord) if sound else None
            if sweep is not None:
                return self._sweep(key, sweep.name, sweep.trials, sweep.objectives, frozenset(sweep.front))
            trials = tuple(stored_trials(self._place(SweepRecord.stage, key)).values()) if sound else ()
            if trials:
                return self._sweep(key, "sweep, not finished", trials, (), None)
            for kind in ENDS:
                if sound and self._place(kind.stage, key).record(kind) is not None:
                    return self._run(key, kind.stage)
        except OSError as error:
            raise ConfigError(f"The store {self.storage_uri!r} cannot be read: {error}") from error
        raise ConfigError(
            f"KEY is {key!r}, and the store {self.storage_uri} has no sweep or finished run of that key. It has: "
            f"{'; '.join(self._known()) or 'none'}. Set --storage-uri to another store."
        )

    def packages(self, content: Content) -> list[tuple[str, Package, StepDir]]:
        """The packages of the models that a report shows, after their labels."""
        places = {one.package_key: (one.label, self._place(Package.stage, one.package_key)) for one in content.shown}
        found = [(label, place.record(Package), place) for key, (label, place) in places.items() if key]
        return [(label, record, place) for label, record, place in found if record is not None]

    def _known(self) -> list[str]:
        sweeps = [f"{record.key} (sweep {record.name})" for record in records(self.storage_uri, SweepRecord)]
        runs = [f"{r.key} ({r.name} version {r.version})" for r in records(self.storage_uri, ModelVersion)]
        return [*sweeps[-5:], *runs[-5:]]

    def _place(self, stage: str, key: str) -> StepDir:
        return StepDir(self.storage_uri, stage, key, self.scratch)

    def steps(self, keys: dict[str, str]) -> Steps:
        """Finished steps by stage, from the keys of some of them; each record names its inputs."""
        found: Steps = {}
        waiting = list(keys.items())
        while waiting:
            stage, key = waiting.pop()
            if stage not in KINDS or stage in found:
                continue
            place = self._place(stage, key)
            record = place.record(KINDS[stage])
            if record is not None:
                found[stage] = record, place
                waiting += record.inputs.items()
        return found

    def _run(self, key: str, stage: str) -> Content:
        steps = self.steps({stage: key})
        student: Student = steps[Student.stage][0]
        version: ModelVersion | None = steps[ModelVersion.stage][0] if ModelVersion.stage in steps else None
        quant = student.recipe["quant"]
        one = shown(key, f"{quant['bits']} {quant['quantizer']}", quant["bits"], "done", steps)
        if version is not None:
            one = replace(one, version=f"{version.name}/{version.version}", aliases=version.aliases)
        name = version.name if version is not None else "run"
        return content(f"{name} at {quant['bits']}", "run", key, [one], steps)

    def _sweep(
        self, key: str, name: str, trials: Sequence[Trial], objectives: Sequence[str], chosen: frozenset[str] | None
    ) -> Content:
        """The picture shows the first objective beside bytes: the gap as perplexity, of several teachers as it is."""
        steps = [self.steps({**trial.places, ModelVersion.stage: trial.key}) for trial in trials]
        shared: Steps = {stage: found for each in reversed(steps) for stage, found in each.items()}
        if Teacher.stage not in shared:
            raise ConfigError(f"KEY is {key!r}, and the store has no steps of its trials.")
        made = {place.key: record for each in steps for stage, (record, place) in each.items() if stage in SHARED}
        alone = sum(isinstance(record, Teacher) for record in made.values()) == 1
        ones = [of_trial(trial, each) for trial, each in zip(trials, steps, strict=True)]
        if not alone:
            ones = [replace(o, metrics=gap_of(t) | o.metrics) for o, t in zip(ones, trials, strict=True)]
        measure = next((objective for objective in objectives if objective != "bytes"), "gap")
        found = content(name, "sweep", key, ones, shared)
        return replace(
            found,
            measure="perplexity" if measure == "gap" and alone else measure,
            shared_costs=costs(made.values()),
            teacher=found.teacher if alone else {},
            teacher_curve=found.teacher_curve if alone else Curve(),
            chosen=chosen,
        )


def gap_of(trial: Trial) -> dict[str, float]:
    """Nats between a trial's student and its own teacher, if it was scored."""
    return {"gap": math.log(trial.student["perplexity"] / trial.teacher["perplexity"])} if trial.student else {}


def of_trial(trial: Trial, steps: Steps) -> Shown:
    """A trial of a sweep, as far as it came."""
    one = shown(trial.key, label(trial.values), trial.bits, trial.status, steps)
    size, version = trial.size, trial.version or {}
    return replace(
        one,
        recipe={**one.recipe, **{path.rpartition(".")[2]: value for path, value in trial.values.items()}},
        metrics=dict(trial.student) or one.metrics,
        packed_bytes=size.packed_bytes if size is not None else one.packed_bytes,
        ratio=size.ratio if size is not None else one.ratio,
        version=f"{version['name']}/{version['version']}" if version else "",
        aliases=tuple(version.get("aliases", ())),
        costs=one.costs or (Cost("trial", trial.seconds, trial.workers),),
        failure=trial.failure,
    )


def shown(key: str, name: str, bits: str, status: str, steps: Steps) -> Shown:
    """What the steps of one student say."""
    one = Shown(key, name, bits, {}, status)
    if Student.stage in steps:
        student, place = steps[Student.stage]
        one = replace(one, recipe=recipe_of(student), curve=curve(_json(student, place, "history.json")))
    if Report.stage in steps:
        one = replace(one, metrics=dict(steps[Report.stage][0].student))
    if Package.stage in steps:
        package, place = steps[Package.stage]
        uri = place.uri_of(Package.FOLDER)
        one = replace(one, packed_bytes=package.size.packed_bytes, ratio=package.size.ratio, package_uri=uri)
        one = replace(one, package_key=place.key, modules=modules(steps), latency=latency.measured(place))
    return replace(one, costs=costs(record for stage, (record, _) in steps.items() if stage not in SHARED))


def content(title: str, kind: str, key: str, ones: list[Shown], steps: Steps) -> Content:
    """A report on models of one teacher; `steps` has what they share."""
    teacher: Teacher = steps[Teacher.stage][0]
    task = steps[Tokens.stage][0].recipe["task"]["name"]
    report: Report | None = steps[Report.stage][0] if Report.stage in steps else None
    return Content(
        title=title,
        kind=kind,
        key=key,
        measure=MEASURES.get(task, "perplexity"),
        protocol=report.protocol if report is not None else "",
        teacher_bytes=teacher.fp32_bytes,
        teacher_parameters=teacher.parameters,
        teacher=dict(report.teacher) if report is not None else {},
        shown=tuple(ones),
        teacher_curve=curve(_json(*steps[Teacher.stage], "history.json")),
        shared_costs=costs(steps[stage][0] for stage in SHARED if stage in steps),
        provenance={k: v for k, v in teacher.provenance.items() if k not in OF_THE_TEACHER_ALONE},
    )


def recipe_of(student: Student) -> dict[str, Any]:
    """The knobs that people compare, where they are set."""
    found = {knob: student.recipe[section].get(knob) for section, knobs in RECIPE_KNOBS.items() for knob in knobs}
    if found["optimizer"] != "muon":
        found["muon_lr"] = None
    return {knob: value for knob, value in found.items() if value not in (None, {})}


def costs(found: Iterable[Record]) -> tuple[Cost, ...]:
    """What steps took, as their records note it."""
    return tuple(
        Cost(
            record.stage,
            float(record.provenance["seconds"]) if "seconds" in record.provenance else None,
            int(record.provenance.get("workers", 1)),
        )
        for record in sorted(found, key=lambda record: list(KINDS).index(record.stage))
    )


def curve(history: Any) -> Curve:
    """Losses from the history that the training loop wrote."""
    points = history or []
    train = [(int(p["step"]), float(p["loss"])) for p in points if "loss" in p]
    validation = [(int(p["step"]), float(p["validation_nats"])) for p in points if "validation_nats" in p]
    return Curve(tuple(train[:: max(1, -(-len(train) // MOST_POINTS))]), tuple(validation))


def modules(steps: Steps) -> tuple[Module, ...]:
    """Bits from the package, gammas from what the trainer saw."""
    package, place = steps[Package.stage]
    config = _json(package, place, f"{Package.FOLDER}config.json") or {}
    looks = _json(*steps[Student.stage], "modules.json") if Student.stage in steps else None
    last = looks[-1]["modules"] if looks else {}
    return tuple(
        Module(
            name=name,
            bits=int(found["bits"]),
            weights=int(found["shape"][0]) * int(found["shape"][1]),
            gamma=last.get(name, {}).get("gamma"),
            zeros=last.get(name, {}).get("zeros"),
            gammas=tuple(
                (look["step"], look["modules"][name]["gamma"]) for look in looks or [] if name in look["modules"]
            ),
        )
        for name, found in config.get("quantization_config", {}).get("modules", {}).items()
    )


def _json(record: Record, place: StepDir, name: str) -> Any:
    """A JSON file of a step, or None if it has none or it is damaged: a report shows what there is."""
    stored = record.files.get(name)
    if stored is None:
        return None
    try:
        return json.loads(place.local(name, stored).read_text(encoding="utf-8"))
    except (DamagedError, ValueError):
        return None
