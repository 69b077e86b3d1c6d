"""The teacher: a checkpoint as it is, or trained in full precision on the task's text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config.training import Finetune
from pipeline.models.build import (
    build,
    fp32_bytes,
    keep_all_layers,
    load_model,
    parameters,
    read_config,
    set_dropout,
)
from pipeline.models.hidden_states import WithStates
from pipeline.sources.models import model_folder
from pipeline.stages.stage import Step
from pipeline.store.records import Advance, StoredFile, Teacher, Tokens
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.training.checkpoints import finish
from pipeline.training.trainer import Run, fit

VERSION = 2


def run(step: Step) -> Teacher:
    if step.recipe["finetune"] is None:
        settings = {"place": step.place, "model": step.locations["model"], "family": step.recipe["model"]["family"]}
        step.engine.task(_import, settings, step.place)
        result: dict[str, Any] = {"steps": 0, "best_step": 0, "validation_nats": None}
        result["files"] = json.loads(step.place.read("attempt/files.json"))
    else:
        step.engine.train(_train, _settings(step), step.place, step.advance)
        result = json.loads(step.place.read("attempt/result.json"))
    facts = json.loads(step.place.read("attempt/facts.json"))
    return Teacher(**step.identity(), **result, **facts)


def _settings(step: Step) -> dict[str, Any]:
    tokens, tokens_place = step.input(Tokens)
    model = step.recipe["model"]
    start = step.locations["model"]
    if "architecture" in model:
        known = {
            "vocab_size": tokens.vocabulary,
            "bos_token_id": tokens.end_of_text,
            "eos_token_id": tokens.end_of_text,
            **task_of(tokens.recipe).model_settings(tokens.end_of_text, tokens.padding),
        }
        start = {"architecture": model["architecture"] | known}
    training = Run(
        recipe=Finetune.model_validate(step.recipe["finetune"]),
        place=step.place,
        tokens=tokens_place,
        train=tokens.splits["train"].shards,
        validation=tokens.splits["validation"].shards,
        resources=step.resources,
        task=task_of(tokens.recipe),
    )
    return {"run": training, "start": start, "family": step.recipe["model"]["family"]}


def _train(run: Run, start: dict[str, Any], family: str, device: torch.device, report: Advance) -> None:
    recipe = run.recipe
    if "architecture" in start:
        model = build(read_config(start["architecture"]), recipe.seed)
    else:
        model = load_model(model_folder(start), start["gguf_file"])
    if isinstance(recipe, Finetune) and recipe.dropout is not None:
        set_dropout(model, recipe.dropout)
    keep_all_layers(model)
    progress = fit(WithStates(model), run, None, device, report)
    if progress is not None:
        finish(run.place, progress, run.steps, _save(model, run.place, family))


def _import(place: StepDir, model: dict[str, Any], family: str) -> None:
    files = _save(load_model(model_folder(model), model["gguf_file"]), place, family)
    place.write("attempt/files.json", json.dumps({name: f.model_dump() for name, f in files.items()}).encode())


def _save(model: PreTrainedModel, place: StepDir, family: str) -> dict[str, StoredFile]:
    """Store the teacher as a Hugging Face folder of its own."""
    with tempfile.TemporaryDirectory(dir=place.scratch_dir()) as folder:
        model.save_pretrained(folder)
        paths = sorted(Path(folder).iterdir())
        files = {Teacher.FOLDER + path.name: place.upload(Teacher.FOLDER + path.name, path) for path in paths}
    count = parameters(model)
    facts = {"parameters": count, "fp32_bytes": fp32_bytes(model), "hidden": model.config.hidden_size, "family": family}
    place.write("attempt/facts.json", json.dumps(facts).encode())
    return files
