"""Encode the frozen student without loss, read it back, and hand on the package only if nothing changed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config.quant import Quant
from pipeline.errors import RunError
from pipeline.models.build import FAMILIES, frozen_student, read_config
from pipeline.package import package as artifact
from pipeline.quant.spec import Encoding
from pipeline.stages.stage import Step
from pipeline.store.records import Package, Report, StoredFile, Student, Teacher, Tokens
from pipeline.store.step_store import StepDir

VERSION = 1


def run(step: Step) -> Package:
    tokens, tokens_place = step.input(Tokens)
    teacher, teacher_place = step.input(Teacher)
    student, student_place = step.input(Student)
    report, _ = step.input(Report)
    facts = {
        "name": step.recipe["name"],
        "teacher_bytes": teacher.fp32_bytes,
        "lineage": {name: done.record.key for name, done in step.inputs.items()} | {"pack": step.place.key},
        "metrics": {"teacher": report.teacher, "student": report.student, "protocol": report.protocol},
    }
    settings = {
        "place": step.place,
        "tokens": tokens_place,
        "tokenizer": tokens.files,
        "teacher": teacher_place,
        "teacher_files": teacher.files,
        "student": student_place,
        "weights": student.files[Student.WEIGHTS],
        "family": student.family,
        "quant": Quant.model_validate({**student.recipe["quant"], **step.recipe["ship"]}),
        "encoding": step.recipe["encoding"],
        "facts": facts,
    }
    manifest, files = step.engine.task(_pack, settings, step.place)
    return Package(**step.identity(), files=files, digest=manifest["digest"], size=manifest["size"])


def _pack(
    place: StepDir,
    tokens: StepDir,
    tokenizer: dict[str, StoredFile],
    teacher: StepDir,
    teacher_files: dict[str, StoredFile],
    student: StepDir,
    weights: StoredFile,
    family: str,
    quant: Quant,
    encoding: Encoding,
    facts: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, StoredFile]]:
    source = teacher.folder(teacher_files, Teacher.FOLDER)
    frozen = frozen_student(source, student.local(Student.WEIGHTS, weights), quant, FAMILIES[family])
    with tempfile.TemporaryDirectory(dir=place.scratch_dir()) as name:
        folder = Path(name)
        for file in tokenizer:
            shutil.copyfile(tokens.local(file, tokenizer[file]), folder / Path(file).name)
        manifest = artifact.write(folder, frozen, read_config(source), quant, encoding, family, facts)
        unpacked, _, _ = artifact.read(folder)
        if unpacked.digest() != frozen.digest():
            raise RunError("The package does not unpack to the tensors that were packed; nothing was stored.")
        files = {f"{Package.FOLDER}{path.name}": path for path in sorted(folder.iterdir())}
        return manifest, {stored: place.upload(stored, path) for stored, path in files.items()}
