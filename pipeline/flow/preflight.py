"""What is checked and resolved before any worker starts: sources pinned, the model's layers, vocabularies, sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.config.data import TrainBpe
from pipeline.config.run import Config
from pipeline.config.training import Cache, Distill
from pipeline.errors import ConfigError
from pipeline.models.build import check_spec, family_of, parameters, read_config, sites, skeleton
from pipeline.sources.content import ContentMemo
from pipeline.sources.fields import rows
from pipeline.sources.models import TOKENIZER_FILES, ModelSource, pin_model
from pipeline.sources.text import SourceFile, pin_text
from pipeline.stages.cache import cache_bytes
from pipeline.stages.tokenize import SPLITS, SplitPart, documents_of, split_parts
from pipeline.store.keys import recipe_of
from pipeline.tasks import task_of
from pipeline.tasks.task import Task
from pipeline.tasks.tokenizers import read_tokenizer, train_bpe

SMALL_TEXT_BYTES = 2**20  # up to here the corpus is counted exactly before anything starts


@dataclass(frozen=True)
class Inputs:
    """The pinned sources of a run and what is known of its model."""

    text: dict[str, tuple[SourceFile, ...]]
    model: ModelSource | None
    tokenizer: ModelSource | None
    config: PreTrainedConfig
    family: str
    parameters: int

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    def tokens_recipe(self, config: Config) -> dict[str, Any]:
        """What the tokenize step depends on. A pretrained decoder says what it reads first; it is part of the rows."""
        recipe = {
            "data": self.text_recipe(config),
            "tokenizer": self.tokenizer_recipe(config),
            "task": recipe_of(config.task),
        }
        if self.config.is_encoder_decoder and self.model is not None:
            recipe["decoder_start"] = self.config.decoder_start_token_id
        return recipe

    def task(self, config: Config) -> Task:
        return task_of(self.tokens_recipe(config))

    def model_recipe(self, config: Config) -> dict[str, Any]:
        if self.model is None:
            return {"architecture": config.model.source, "family": self.family}
        return {"content": self.model.content, "family": self.family}

    def tokenizer_recipe(self, config: Config) -> dict[str, Any]:
        if isinstance(config.model.tokenizer, TrainBpe):
            return config.model.tokenizer.model_dump()
        return {"content": self.tokenizer.content if self.tokenizer else {}}

    def text_recipe(self, config: Config) -> dict[str, Any]:
        """Content of each split's files; where they lie stays out."""
        recipe = recipe_of(config.data)
        for split, name in zip(SPLITS, ("source", "validation", "test"), strict=True):
            del recipe[name]
            files = self.text.get(split)
            recipe[split] = [{"content": f.content, "format": f.format} for f in files] if files else None
        held_out = recipe["validation"] is None or recipe["test"] is None or recipe["sample"] < 1
        if "candidates_column" in recipe and held_out:
            recipe["kept_together"] = "conversations"
        return recipe


def inspect(config: Config, scratch: str) -> Inputs:
    """Pin every source and check that model, tokenizer and quantization fit together.

    Raises:
        ConfigError: the first thing that cannot work.
    """
    try:
        Path(scratch).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The scratch folder {scratch} cannot be made: {error}. Set resources.storage_uri or "
            "resources.local_cache_dir to a directory you may write to."
        ) from error
    memo = ContentMemo(str(Path(scratch).expanduser()))
    named = {"train": config.data.source, "validation": config.data.validation, "test": config.data.test}
    knobs = {"train": "data.source", "validation": "data.validation", "test": "data.test"}
    text = {split: pin_text(source, knobs[split], memo) for split, source in named.items() if source is not None}
    model, tokenizer = _pin_models(config, memo)
    model_config = _model_config(config, model, tokenizer)
    family = family_of(model_config, config.model.family)
    shape = skeleton(model_config)
    sites(shape, family)
    check_spec(shape, family, config.quant.spec())
    inputs = Inputs(text, model, tokenizer, model_config, family.name, parameters(shape))
    _check_task(config, inputs.task(config), inputs)
    return inputs


def _check_task(wanted: Config, task: Task, inputs: Inputs) -> None:
    """Raises ConfigError if the task needs another kind of model, more positions, or tokens that are not there."""
    config, tokenizer = inputs.config, inputs.tokenizer
    if task.encoder_decoder != bool(config.is_encoder_decoder):
        needs = "an encoder and a decoder" if task.encoder_decoder else "a decoder alone"
        raise ConfigError(
            f"task.name is {wanted.task.name}, which needs {needs}, and model.source is a {config.model_type} model. "
            f"Use a model of the families {'bart' if task.encoder_decoder else 'gpt2, llama'}, or another task."
        )
    decided = {"bos_token_id", "eos_token_id", *task.model_settings(None, None)}
    for field in decided.intersection(wanted.model.source if isinstance(wanted.model.source, dict) else ()):
        raise ConfigError(f"model.source.{field}: the tokenizer decides it; leave it out")
    longest = getattr(config, "max_position_embeddings", None)
    for knob, length in task.positions.items():
        if longest is not None and length > longest:
            raise ConfigError(f"{knob} is {length}, and the model has {longest} positions; lower it.")
    layers = int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)
    if wanted.distill.compared_layer < -layers - 1:
        raise ConfigError(
            f"distill.contrast_layer is {wanted.distill.contrast_layer}, and the model has {layers} decoder layers and "
            f"the embedding; valid: -1 to {-layers - 1}."
        )
    if tokenizer is not None:
        task.check_tokenizer(read_tokenizer(tokenizer.folder, tokenizer.gguf_file))


def _pin_models(config: Config, memo: ContentMemo) -> tuple[ModelSource | None, ModelSource | None]:
    source, tokenizer = config.model.source, config.model.tokenizer
    model = pin_model(source, "model.source", memo) if isinstance(source, str) else None
    if isinstance(tokenizer, TrainBpe):
        return model, None
    where, knob = (tokenizer, "model.tokenizer") if tokenizer is not None else (source, "model.source")
    if not isinstance(where, str):
        raise ConfigError("model.tokenizer is missing")
    return model, pin_model(where, knob, memo, TOKENIZER_FILES)


def _model_config(config: Config, model: ModelSource | None, tokenizer: ModelSource | None) -> PreTrainedConfig:
    """The model's configuration; its vocabulary is checked against the tokenizer's."""
    size = None
    if tokenizer is not None:
        size = len(read_tokenizer(tokenizer.folder, tokenizer.gguf_file))
    elif isinstance(config.model.tokenizer, TrainBpe):
        size = config.model.tokenizer.train_bpe
    if model is None:
        if not isinstance(config.model.source, dict):
            raise ConfigError("model.source is missing")
        return read_config(config.model.source, vocab_size=size)
    found = read_config(model.folder, model.gguf_file)
    # A model's own tokenizer may be smaller than its table, which many models pad; another one has to match.
    if size is not None and (size > found.vocab_size or (config.model.tokenizer and size != found.vocab_size)):
        raise ConfigError(
            f"The tokenizer has {size} tokens and the model {found.vocab_size}; they do not belong together. "
            f"model.source is {config.model.source!r}, model.tokenizer is {config.model.tokenizer!r}."
        )
    return found


def check_length(config: Config, inputs: Inputs, locations: dict[str, Any], scratch: str) -> None:
    """Count a small corpus exactly. Raises ConfigError if a split cannot fill what it must."""
    small = [split for split, files in inputs.text.items() if sum(file.bytes for file in files) <= SMALL_TEXT_BYTES]
    recipe, task = inputs.tokens_recipe(config), inputs.task(config)
    work = split_parts(recipe, locations)
    _check_columns(recipe, work, scratch)
    if not small:
        return
    found = {
        split: [document for part in work if part.split == split for document in documents_of(part, recipe, scratch)]
        for split in SPLITS
        if (split if inputs.text.get(split) else "train") in small
    }
    if isinstance(config.model.tokenizer, TrainBpe):
        known = found.get("train") or [document for some in found.values() for document in some]
        strings = (text for document in known for text in task.strings(document))
        tokenizer = train_bpe(strings, config.model.tokenizer.train_bpe, task.special_tokens)
    elif inputs.tokenizer is not None:
        tokenizer = read_tokenizer(inputs.tokenizer.folder, inputs.tokenizer.gguf_file)
    for split, documents in found.items():
        shared = task.collect(documents, split) if task.collects else None
        _, lengths, _ = task.encode(iter(documents), tokenizer, split, shared, config.data.unit)
        shortage = task.shortage(split, len(lengths), task.tokens(lengths))
        if shortage is not None:
            raise ConfigError(shortage)


def _check_columns(recipe: dict[str, Any], work: Sequence[SplitPart], scratch: str) -> None:
    """Read the first row of each file on this machine. Raises ConfigError if it lacks a column of the task."""
    columns = task_of(recipe).columns(recipe["data"])
    for part in work if columns is not None else ():
        if part.start == 0 and ("://" not in part.file.uri or part.file.format == "python"):
            next(rows(part, columns or (), scratch), None)


def estimated_rows(config: Config, task: Task, files: Sequence[SourceFile]) -> int:
    """About how many rows of training text there are."""
    held_out = sum(config.data.holdout for given in (config.data.validation, config.data.test) if given is None)
    text_bytes = sum(file.bytes for file in files) * config.data.sample * (1 - held_out)
    return task.estimated_rows(text_bytes)


def cheaper_mode(
    cache: Cache, distill: Distill, inputs: Inputs, rows: int, positions: int, gib_per_hour: float
) -> tuple[str, str]:
    """`states` or `online`, with the arithmetic: hours of the teacher that the states save against their price."""
    size_gib = cache_bytes(rows, positions, inputs.hidden, cache.dtype) / 2**30
    uses = distill.steps * distill.batch_size if distill.steps is not None else (distill.epochs or 0) * rows
    rate = flops_per_s() / (2 * inputs.parameters)
    saved_hours = max(0.0, uses - rows) * positions / rate / 3600
    mode = "states" if saved_hours * gib_per_hour >= size_gib else "online"
    why = (
        f"{mode}: states save {uses:.0f} - {rows} rows of the teacher = {saved_hours:.3f} h at {rate:,.0f} tokens/s "
        f"(measured matmul rate / 2 x {inputs.parameters:,} parameters), worth {saved_hours * gib_per_hour:.2f} GiB "
        f"at {gib_per_hour:g} GiB an hour; they take {size_gib:.2f} GiB"
    )
    return mode, why


def flops_per_s() -> float:
    size, repeats = 512, 8
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)
