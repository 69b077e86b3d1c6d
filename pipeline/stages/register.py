"""Register the package as a model version, if what was scored is what was packed and it passes the gate."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from pipeline.errors import NotRegisteredError, RunError
from pipeline.stages.samples import samples
from pipeline.stages.stage import Done, Step
from pipeline.store.records import ModelVersion, Package, Report, StoredFile, Student, Teacher, Tokens
from pipeline.store.step_store import StepDir
from pipeline.tracking import registry, runs
from pipeline.training import figures

VERSION = 1


def run(step: Step) -> ModelVersion:
    package, package_place = step.input(Package)
    report, _ = step.input(Report)
    recipe, name = step.recipe, step.recipe["name"]
    if report.digest != package.digest:
        raise RunError("What was scored is not what was packed: the digests differ. Nothing was registered.")
    _pass(recipe["gate"]["max_perplexity_ratio"], report, package_place.uri)
    settings = step.locations["tracking"]
    client = runs.connect(settings["uri"])
    try:
        experiment_id = runs.experiment_id(client, settings["experiment"], settings["artifacts"])
        run = runs.find_or_create_run(client, experiment_id, step.place.key, f"{name} {settings['bits']}")
        metrics = _metrics(report, package)
        runs.log_run(client, run, settings["params"], settings["recipe"], metrics, _curves(step))
        runs.log_figures(client, run.info.run_id, _figures(step))
        client.log_text(run.info.run_id, _samples(step), "samples.txt")
        version = registry.find_version(client, name, step.place.key)
        model_id = str(version.model_id) if version is not None else ""
        if version is None:
            version, model_id = registry.register_package(
                client,
                run.info.run_id,
                experiment_id,
                name,
                step.place.key,
                package_place.folder(package.files, Package.FOLDER),
                _tags(step, package, package_place.uri_of(Package.FOLDER)),
                metrics,
            )
        if str(version.version) == registry.FIRST:
            registry.crown(client, name)
        aliases = registry.aliases_of(client, name, version.version)
    except MlflowException as error:
        raise RunError(
            f"MLflow at {settings['uri']} refused the registration: {str(error).splitlines()[0]}. The package is kept "
            f"at {package_place.uri}; the same command registers it."
        ) from error
    return ModelVersion(
        **step.identity(),
        name=name,
        version=int(version.version),
        aliases=aliases,
        run_id=run.info.run_id,
        model_id=model_id,
    )


def _pass(limit: float | None, report: Report, uri: str) -> None:
    ratio = report.student["perplexity"] / report.teacher["perplexity"]
    if limit is not None and ratio > limit:
        raise NotRegisteredError(
            f"The student's perplexity is {ratio:.3f} times the teacher's, above register.gate.max_perplexity_ratio "
            f"({limit:g}). It was not registered; the package is kept at {uri}."
        )


def _metrics(report: Report, package: Package) -> dict[str, float]:
    """Student metrics under their own names, the teacher's with a prefix, and sizes."""
    teacher = {f"teacher_{name}": value for name, value in report.teacher.items()}
    size = {name: float(value) for name, value in package.size.model_dump().items()}
    return {**report.student, **teacher, **size}


def _curves(step: Step) -> dict[str, list[dict[str, float]]]:
    """Losses of teacher and student, and the facts of each of the student's modules."""
    curves = {}
    for stage in (Teacher.stage, Student.stage):
        history = _json(step, stage, "history.json")
        if history is not None:
            curves[stage] = history
    for look in _json(step, Student.stage, "modules.json") or []:
        for module, facts in look["modules"].items():
            curves.setdefault(f"modules/{module}", []).append({"step": look["step"], **facts})
    return curves


def _samples(step: Step) -> str:
    """What the packed student writes for rows of the validation split."""
    report, place = step.input(Report)
    package, package_place = step.input(Package)
    tokens = replace(place, stage=Tokens.stage, key=report.inputs[Tokens.stage], fence=None)
    settings = {"package": package_place, "files": package.files, "tokens": tokens}
    return step.engine.task(_write_samples, settings, step.place)


def _write_samples(package: StepDir, files: dict[str, StoredFile], tokens: StepDir) -> str:
    record = tokens.record(Tokens)
    if record is None:
        return "The tokens that the student was trained on are gone.\n"
    with tempfile.TemporaryDirectory(dir=package.scratch_dir()) as name:  # a packed model holds no links
        folder = shutil.copytree(package.folder(files, Package.FOLDER), Path(name) / "package")
        return samples(folder, tokens, record)


def _figures(step: Step) -> dict[str, Any]:
    looks, histograms = (_json(step, Student.stage, name) for name in ("modules.json", "histograms.json"))
    drawn = {}
    if looks:
        drawn["modules.png"] = figures.module_curves(looks)
        drawn["token_cosine.png"] = figures.cosine_curve(_json(step, Student.stage, "history.json"))
    if histograms:
        drawn["weights.png"] = figures.weight_histograms(histograms)
    return drawn


def _json(step: Step, stage: str, name: str) -> Any:
    """A JSON file of an earlier step, or None if it has none of that name."""
    done: Done = step.inputs[stage]
    stored = done.record.files.get(name)
    return json.loads(done.place.local(name, stored).read_text()) if stored is not None else None


def _tags(step: Step, package: Package, uri: str) -> dict[str, str]:
    settings: dict[str, Any] = step.locations["tracking"]
    lineage = {f"bitmill.{name}": done.record.key for name, done in step.inputs.items()}
    return {
        **lineage,
        "bitmill.bits": settings["bits"],
        "bitmill.quantizer": settings["params"]["quantizer"],
        "bitmill.task": settings["params"]["task"],
        "bitmill.digest": package.digest,
        "bitmill.package_uri": uri,
    }
