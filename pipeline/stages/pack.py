"""Encode the frozen student without loss, read it back, and hand on the package only if nothing changed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.quant import Quant
from pipeline.errors import RunError
from pipeline.models.build import read_config
from pipeline.models.student import load_frozen
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always, upload_folder
from pipeline.store.records import Evaluation, Package, StoredFile, Student, Teacher, Tokens


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return how codes are packed, and the name that the model card bears."""
    return {"encoding": run.config.pack.encoding, "name": run.config.register_.name or run.config.name}


def run(step: Step) -> Package:
    """Pack the student with its scores and its lineage."""
    manifest, files = step.engine.task(partial(_pack, step.job), step.dir)
    return Package(**step.identity(), files=files, digest=manifest["digest"], size=manifest["size"])


STAGE = Stage(Package, always(Tokens, Teacher, Student, Evaluation), recipe, run, version=2)


def _pack(job: StepJob) -> tuple[dict[str, Any], dict[str, StoredFile]]:
    from pipeline.package.package import read_package, write_package  # transformers, for those who only plan

    tokens, teacher, student = job.input(Tokens), job.input(Teacher), job.input(Student)
    evaluation = job.input(Evaluation).record
    facts = {  # for manifest and model card
        "name": job.recipe["name"],
        "teacher_bytes": teacher.record.fp32_bytes,
        "lineage": {name: earlier.record.key for name, earlier in job.inputs.items()} | {"pack": job.dir.key},
        "metrics": evaluation.model_dump(include={"teacher", "student", "validation", "protocol"}),
    }
    quant, encoding = Quant.model_validate(student.record.recipe["quant"]), job.recipe["encoding"]
    frozen, config = load_frozen(student.local(Student.FROZEN)), read_config(teacher.folder())
    with job.dir.scratch_folder() as folder:
        for file in tokens.record.files:
            shutil.copyfile(tokens.local(file), folder / Path(file).name)
        manifest = write_package(folder, frozen, config, quant, encoding, student.record.family, facts)
        read_package(folder)  # which refuses to unpack to other tensors than the manifest's
        if manifest["digest"] != student.record.digest:
            raise RunError("The package does not unpack to the tensors that were scored; nothing was stored.")
        return manifest, upload_folder(job.dir, folder, Package.FOLDER)
