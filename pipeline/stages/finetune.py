"""The teacher: a checkpoint as it is, or trained in full precision on the task's text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.training import Finetune
from pipeline.models.build import build, fp32_bytes, keep_all_layers, load_model, parameters, read_config, set_dropout
from pipeline.models.checkpoint import DROP
from pipeline.models.family import WALKED
from pipeline.models.hidden_states import WithStates, refuse_other_head
from pipeline.sources.models import model_folder
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, training_job, upload_folder
from pipeline.store.keys import recipe_of
from pipeline.store.records import Advance, Record, StoredFile, Teacher, Tokens, never
from pipeline.training.checkpoints import finish
from pipeline.training.trainer import Trainer

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedModel


def inputs(run: PinnedRun) -> tuple[type[Record], ...]:
    """Return the tokens where there is something to train; a checkpoint that is taken as it is needs none."""
    return (Tokens,) if run.config.finetune is not None else ()


def recipe(run: PinnedRun) -> dict[str, Any]:
    """Return the model's content, or its architecture, and how it is trained."""
    section = run.config.finetune
    model = {"architecture": run.config.model.source} if run.model is None else {"content": run.model.content}
    return {
        "model": model | {"family": run.family.name},
        "finetune": recipe_of(section) if section is not None else None,
    }


def locations(run: PinnedRun) -> dict[str, Any]:
    """Return where the checkpoint lies."""
    return {"model": run.model.location() if run.model is not None else None}


def run(step: Step) -> Teacher:
    """Import the checkpoint, or train it on every worker."""
    if step.recipe["finetune"] is None:
        files = step.engine.task(partial(_import, step.job), step.dir)
        result: dict[str, Any] = {"steps": 0, "best_step": 0, "validation_nats": None, "files": files}
    else:
        step.engine.train(partial(_train, step.job), step.dir, step.advance)
        result = json.loads(step.dir.read(step.dir.place("attempt/result.json")))
    facts = json.loads(step.dir.read(step.dir.place("attempt/facts.json")))
    return Teacher(**step.identity(), **result, **facts)


STAGE = Stage(Teacher, inputs, recipe, run, locations, version=5, shared=True, unit="steps")


def _train(job: StepJob, device: torch.device, report: Advance, ending: Callable[[], bool] = never) -> None:
    recipe = Finetune.model_validate(job.recipe["finetune"])
    training = training_job(job, recipe)
    model = _checkpoint(job) if job.locations["model"] is not None else _new_model(job, recipe.seed)
    _check_head(model, job)
    if recipe.dropout is not None:
        set_dropout(model, recipe.dropout)
    keep_all_layers(model)
    trained = WithStates(model)
    progress = Trainer(trained, training, None, device, report, ending).run()
    if progress is not None:
        finish(job.dir, progress, training.steps, _save(trained.model, job))


def _new_model(job: StepJob, seed: int) -> PreTrainedModel:
    """Return a model of the architecture, of the vocabulary that the tokens have."""
    tokens = job.input(Tokens).record
    decided = {
        "vocab_size": tokens.vocabulary,
        "bos_token_id": tokens.end_of_text,
        "eos_token_id": tokens.end_of_text,
        **job.task.model_settings(tokens.end_of_text, tokens.padding),
    }
    return build(read_config(job.recipe["model"]["architecture"], **decided), seed)


def _checkpoint(job: StepJob) -> PreTrainedModel:
    location = job.locations["model"]
    return load_model(model_folder(location), location["gguf_file"], DROP)  # the plan refused what may not be dropped


def _import(job: StepJob) -> dict[str, StoredFile]:
    model = _checkpoint(job)
    _check_head(model, job)
    return _save(model, job)


def _check_head(model: PreTrainedModel, job: StepJob) -> None:
    """Raise ConfigError for a model of no family whose head is not what it would be taken for."""
    if job.recipe["model"]["family"] == WALKED.name:
        refuse_other_head(model)


def _save(model: PreTrainedModel, job: StepJob) -> dict[str, StoredFile]:
    """Store the teacher as a Hugging Face folder of its own."""
    with job.dir.scratch_folder() as folder:
        model.save_pretrained(folder)
        files = upload_folder(job.dir, folder, Teacher.FOLDER)
    count, family = parameters(model), job.recipe["model"]["family"]
    facts = {"parameters": count, "fp32_bytes": fp32_bytes(model), "hidden": model.config.hidden_size, "family": family}
    job.dir.write("attempt/facts.json", json.dumps(facts).encode())
    return files
