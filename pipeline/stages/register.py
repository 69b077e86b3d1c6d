"""Register the package as a model version, if what was scored is what was packed and it passes the gate."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config.run import Gate
from pipeline.errors import NotRegisteredError, RunError
from pipeline.metrics import bounded, gap_nats
from pipeline.stages.stage import PinnedRun, Stage, Step, always
from pipeline.store.keys import recipe_of
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Evaluation, ModelVersion, Package, Student, Teacher
from pipeline.tracking import registry, runs
from pipeline.tracking.query import VALIDATION

LATENT_TAG = "bitmill.latent_sha256"  # of the weights that a student can be trained on from


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return the registered name, and what a student must pass."""
    config = run.config
    return {"name": config.register_.name or config.name, "gate": recipe_of(config.register_.gate)}


def locations(run: PinnedRun) -> dict[str, Any]:
    """Return the MLflow run: where it goes, and what it says of the configuration."""
    config, distill = run.config, run.config.distill
    params = {
        "bits": config.quant.bits,
        "quantizer": config.quant.quantizer,
        "granularity": str(config.quant.granularity),
        "task": config.task.name,
        **{knob.removeprefix("task."): length for knob, length in run.task.positions.items()},
        "steps": f"{distill.epochs} epochs" if distill.steps is None else distill.steps,
        "batch_size": distill.batch_size,
        "lr": distill.lr,
        "optimizer": distill.optimizer,
        **({"muon_lr": distill.muon_lr} if distill.optimizer == "muon" else {}),
        "gamma_lr": distill.gamma_lr,
        "contrast_weight": distill.contrast_weight,
        "seed": distill.seed,
        **({"start": run.start.version} if run.start is not None else {}),
    }
    uri = tracking_uri(config.resources)
    database = runs.sqlite_file(uri)
    return {
        "uri": uri,
        "artifacts": (database.parent / "mlflow-artifacts").as_uri() if database else None,
        "experiment": config.name,
        "params": params,
        "recipe": config.model_dump(mode="json", by_alias=True, exclude={"resources", "sweep", "retrain"}),
    }


def run(step: Step) -> ModelVersion:
    """Log the run with its curves and pictures, and make its package a version."""
    package, evaluation = step.input(Package), step.input(Evaluation)
    name, params = step.recipe["name"], step.locations["params"]
    if evaluation.record.digest != package.record.digest:
        raise RunError("What was scored is not what was packed: the digests differ. Nothing was registered.")
    _pass(Gate.model_validate(step.recipe["gate"]), evaluation.record, package.folder_uri)
    target = target_at(step.locations, step.dir.key, f"{name} {params['bits']}", None)
    metrics = _metrics(evaluation.record, package.record)
    advice = f"The package is kept at {package.folder_uri}; the same command registers it."
    with runs.refusal(f"MLflow at {target.uri} refused the registration", advice):
        client, logged = runs.connect(target.uri), runs.find_run(target)
        runs.log_run(client, logged, params, step.locations["recipe"], metrics, _curves(step))
        runs.log_figures(client, logged.info.run_id, _figures(step))
        for file in (name for name in ("samples.txt", Evaluation.SUITES) if name in evaluation.record.files):
            client.log_text(logged.info.run_id, evaluation.local(file).read_text(encoding="utf-8"), file)
        version, model_id = registry.register_package(
            client, logged, name, step.dir.key, package.folder(), _tags(step), metrics
        )
        aliases = registry.aliases_of(client, name, version.version)
    return ModelVersion(
        **step.identity(),
        name=name,
        version=int(version.version),
        aliases=aliases,
        run_id=logged.info.run_id,
        model_id=model_id,
    )


STAGE = Stage(ModelVersion, always(Teacher, Student, Evaluation, Package), recipe, run, locations, version=3)


def target_at(locations: dict[str, Any], key: str, name: str, parent: str | None) -> runs.Target:
    """Return the MLflow run of a key by the locations of this stage; `parent` is the key of the run it is nested in."""
    return runs.Target(locations["uri"], locations["experiment"], locations["artifacts"], key, name, parent)


def _pass(gate: Gate, evaluation: Evaluation, uri: str) -> None:
    ratio, limit = math.exp(gap_nats(**evaluation.validation)), gate.max_perplexity_ratio
    if limit is not None and ratio > limit:
        raise NotRegisteredError(
            f"On validation the student's perplexity is {ratio:.3f} times the teacher's, above "
            f"register.gate.max_perplexity_ratio ({limit:g}). It was not registered; the package is kept at {uri}."
        )

    for knob, metric, bound in gate.bounds:
        kept, said = bounded(knob, metric, bound, evaluation.validation["student"])
        if not kept:
            raise NotRegisteredError(
                f"The student fails register.gate.{knob}: {said}. It was not registered; the package is kept at {uri}."
            )


def _metrics(evaluation: Evaluation, package: Package) -> dict[str, float]:
    """Return metrics of the test split, of the teacher with a prefix; those of validation with another; and sizes."""
    test = named(evaluation.teacher, evaluation.student)
    validation = {f"{VALIDATION}{name}": value for name, value in named(**evaluation.validation).items()}
    size = {name: float(value) for name, value in package.size.model_dump().items()}
    return {**test, **validation, **size}


def named(teacher: dict[str, float], student: dict[str, float]) -> dict[str, float]:
    """Return the metrics of both under names of their own."""
    return {**student, **{f"teacher_{name}": value for name, value in teacher.items()}}


def _curves(step: Step) -> dict[str, list[dict[str, float]]]:
    """Return losses of teacher and student, and the facts of each of the student's modules."""
    curves = {}
    for kind in (Teacher, Student):
        history = step.input(kind).read_json("history.json")
        if history is not None:
            curves[kind.stage] = history
    for look in step.input(Student).read_json("modules.json") or []:
        for module, facts in look["modules"].items():
            curves.setdefault(f"modules/{module}", []).append({"step": look["step"], **facts})
    return curves


def _figures(step: Step) -> dict[str, Any]:
    from pipeline.training import figures  # matplotlib, for those who only plan

    student = step.input(Student)
    looks, histograms = student.read_json("modules.json"), student.read_json("histograms.json")
    pictures = {}
    if looks:
        pictures["modules.png"] = figures.module_curves(looks)
        pictures["token_cosine.png"] = figures.cosine_curve(student.read_json("history.json"))
    if histograms:
        pictures["weights.png"] = figures.weight_histograms(histograms)
    return pictures


def _tags(step: Step) -> dict[str, str]:
    package, student, params = step.input(Package), step.input(Student), step.locations["params"]
    lineage = {f"bitmill.{name}": earlier.record.key for name, earlier in step.inputs.items()}
    return {
        **lineage,
        **{f"bitmill.{name}": params[name] for name in ("bits", "quantizer", "task", "start") if name in params},
        "bitmill.digest": package.record.digest,
        "bitmill.package_uri": package.folder_uri,
        "bitmill.latent_uri": student.uri(Student.WEIGHTS),
        LATENT_TAG: student.record.files[Student.WEIGHTS].sha256,
    }
