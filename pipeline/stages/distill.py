"""The student: the teacher's copy, quantized, trained to give the teacher's distributions and representations.

When training ends the best weights are frozen, once: what is scored, packed and shipped are these tensors. The latent
weights are kept beside them, so that a student can be trained on: latent weights and the parameters of the quantizers
(scales, or what they are computed from). The state of the optimizer and the memory bank are not; a student that starts
from them has an optimizer, a schedule and a memory bank of its own, from step 0.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.distill.losses import contrastive_loss
from pipeline.distill.memory_bank import MemoryBank
from pipeline.errors import DamagedError, RunError
from pipeline.models.build import load_model, set_dropout
from pipeline.models.compiled import compile_layers, compiled
from pipeline.models.family import family_named
from pipeline.models.hidden_states import WithStates, head_of
from pipeline.models.sharded import let_go, share_out, shares
from pipeline.models.student import freeze_student, load_parameters, make_student, save_frozen
from pipeline.quant.modules import multiply_integers
from pipeline.stages.stage import PinnedRun, Stage, Start, Step, StepJob, always, training_job
from pipeline.store.keys import recipe_of
from pipeline.store.records import Advance, Student, Teacher, TeacherCache, Tokens, never
from pipeline.training.checkpoints import finish, store_tensors, weights
from pipeline.training.diagnostics import weight_histograms
from pipeline.training.distillation import Distillation
from pipeline.training.trainer import Trainer, TrainingJob


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return how the student is quantized, stored and trained, and the content of what it starts from."""
    distill = {knob: value for knob, value in recipe_of(run.config.distill).items() if knob != "start"}
    start = {} if run.start is None else {"start": run.start.sha256}
    return {"quant": recipe_of(run.config.quant), "distill": distill, **start}


def locations(run: PinnedRun) -> dict[str, Any]:
    """Return where the weights lie that the student starts from."""
    return {} if run.start is None else {"start": run.start}


def run(step: Step) -> Student:
    """Train the student on every worker; rank 0 freezes and stores it."""
    step.engine.train(partial(_train, step.job), step.dir, step.advance)
    teacher = step.input(Teacher).record
    result = json.loads(step.dir.read(step.dir.place("attempt/result.json")))
    return Student(**step.identity(), family=teacher.family, parameters=teacher.parameters, **result)


STAGE = Stage(Student, always(Tokens, Teacher, TeacherCache), recipe, run, locations, version=6, unit="steps")


def _train(job: StepJob, device: torch.device, report: Advance, ending: Callable[[], bool] = never) -> None:
    teacher, cache, step_dir = job.input(Teacher), job.input(TeacherCache), job.dir
    quant, family = Quant.model_validate(job.recipe["quant"]), teacher.record.family
    recipe = Distill.model_validate(job.recipe["distill"])
    training = training_job(job, recipe, cache if cache.record.mode != "online" else None)
    latent = latent_weights(job.locations["start"]) if "start" in job.locations else None
    student, distillation = make(training, teacher.folder(), family, quant, device, latent)
    progress = Trainer(student, training, distillation, device, report, ending).run()
    if progress is None:  # another rank stores what there is
        return
    frozen = freeze_student(student.model.cpu(), quant, family_named(family))
    with step_dir.scratch_folder() as folder:
        save_frozen(frozen, folder / "frozen")
        files = {Student.FROZEN: step_dir.upload(Student.FROZEN, folder / "frozen")}
    files[Student.WEIGHTS] = store_tensors(step_dir, Student.WEIGHTS, weights(student))
    histograms = json.dumps(weight_histograms(student.model)).encode()
    files["histograms.json"] = step_dir.write("histograms.json", histograms)
    finish(step_dir, progress, training.steps, files, digest=frozen.digest())


def latent_weights(start: Start) -> Path:
    """Return a local, checked copy of a version's latent weights. Raises RunError if they are gone or changed."""
    record = start.student.record(Student)
    stored = record.files[Student.WEIGHTS] if record is not None else None
    if stored is None or stored.sha256 != start.sha256:
        raise RunError(f"distill.start: the latent weights of {start.version} left {start.student.uri} meanwhile.")
    try:
        return start.student.local(Student.WEIGHTS, stored)
    except DamagedError as error:  # which no step of this run can mend
        raise RunError(f"distill.start: the latent weights of {start.version} cannot be used. {error}") from error


def make(
    job: TrainingJob, folder: Path, family: str, quant: Quant, device: torch.device, latent: Path | None = None
) -> tuple[WithStates, Distillation]:
    """Return the student, started from the teacher's weights or from `latent`, and what it is distilled from."""
    recipe = job.recipe
    if not isinstance(recipe, Distill):
        raise TypeError("distillation needs a Distill recipe")
    online = job.cache is None
    teacher = WithStates(load_model(folder).requires_grad_(False), recipe.compared_layer).eval()
    if online:
        teacher = share_out(teacher, device) if shares(job.resources) else teacher.to(device)
    compiles = job.resources.compiles(device)
    if compiles:
        compile_layers(teacher.model)
    student, config = load_model(folder), teacher.model.config
    set_dropout(student, 0.0)  # cached states have none
    make_student(student, quant.spec(), family_named(family))
    if recipe.products == "int8":
        multiply_integers(student)
    if latent is not None:
        load_parameters(student, load_file(latent))

    def states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        let_go(teacher)  # of what the last pass has left, of which the head alone has any use
        return cast(tuple[Tensor, Tensor], teacher(*inputs))

    head = None if job.cache is not None and job.cache.record.mode == "logits" else head_of(teacher.model)
    distillation = Distillation(
        recipe=recipe,
        head=head if online or head is None else copy.deepcopy(head).to(device),
        teacher=states if online else None,
        bank=MemoryBank(config.vocab_size, config.hidden_size, recipe.momentum, device),
        contrastive=compiled(contrastive_loss) if compiles else contrastive_loss,
    )
    return WithStates(student, recipe.compared_layer), distillation
