"""What is checked and resolved before any worker starts: sources pinned, the model's layers, vocabularies, sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.config import Cache, Config, Distill, TrainBpe
from pipeline.errors import ConfigError
from pipeline.families.models import check_spec, family_of, parameters, read_config, sites, skeleton
from pipeline.identity import recipe_of
from pipeline.sources.content import ContentMemo
from pipeline.sources.models import TOKENIZER_FILES, ModelSource, pin_model
from pipeline.sources.text import SourceFile, pin_text
from pipeline.stages.cache import cache_bytes
from pipeline.stages.tokenize import SPLITS, split_parts, texts, too_short
from pipeline.tasks.language_modeling import encode
from pipeline.tasks.tokenizers import read_tokenizer, train_bpe

SMALL_TEXT_BYTES = 2**20  # up to here the corpus is counted exactly before anything starts
BYTES_A_TOKEN = 4  # a guess, for corpora not yet tokenized


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
    layers = int(model_config.num_hidden_layers)
    if config.distill.contrast_layer < -layers - 1:
        raise ConfigError(
            f"distill.contrast_layer is {config.distill.contrast_layer}, and the model has {layers} layers and the "
            f"embedding; valid: -1 to {-layers - 1}."
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.task.block_length > longest:
        raise ConfigError(
            f"task.block_length is {config.task.block_length}, and the model has {longest} positions; lower it."
        )
    return Inputs(text, model, tokenizer, model_config, family.name, parameters(shape))


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
    if not small:
        return
    recipe = {"data": inputs.text_recipe(config)}
    work = split_parts(recipe, locations)
    found = {
        split: [text for part in work if part.split == split for text in texts(part, recipe["data"], scratch)]
        for split in SPLITS
        if (split if inputs.text.get(split) else "train") in small
    }
    if isinstance(config.model.tokenizer, TrainBpe):
        texts_known = found.get("train") or [text for some in found.values() for text in some]
        tokenizer = train_bpe(texts_known, config.model.tokenizer.train_bpe)
    elif inputs.tokenizer is not None:
        tokenizer = read_tokenizer(inputs.tokenizer.folder, inputs.tokenizer.gguf_file)
    width = config.task.block_length
    for split, split_texts in found.items():
        _, lengths, _ = encode(split_texts, tokenizer, width, config.data.unit)
        if lengths.sum() < (width if split == "train" else len(lengths) + 1):
            raise ConfigError(too_short(split, int(lengths.sum()), width))


def estimated_rows(config: Config, files: Sequence[SourceFile]) -> int:
    """About how many rows of training text there are."""
    held_out = sum(config.data.holdout for given in (config.data.validation, config.data.test) if given is None)
    text_bytes = sum(file.bytes for file in files) * config.data.sample * (1 - held_out)
    return max(1, int(text_bytes / BYTES_A_TOKEN / config.task.block_length))


def cheaper_mode(
    cache: Cache, distill: Distill, inputs: Inputs, rows: int, block_length: int, gib_per_hour: float
) -> tuple[str, str]:
    """`states` or `online`, with the arithmetic: hours of the teacher that the states save against their price."""
    size_gib = cache_bytes(rows, block_length, inputs.hidden, cache.dtype) / 2**30
    uses = distill.steps * distill.batch_size if distill.steps is not None else (distill.epochs or 0) * rows
    rate = _flops_per_s() / (2 * inputs.parameters)
    saved_hours = max(0.0, uses - rows) * block_length / rate / 3600
    mode = "states" if saved_hours * gib_per_hour >= size_gib else "online"
    why = (
        f"{mode}: states save {uses:.0f} - {rows} rows of the teacher = {saved_hours:.3f} h at {rate:,.0f} tokens/s "
        f"(measured matmul rate / 2 x {inputs.parameters:,} parameters), worth {saved_hours * gib_per_hour:.2f} GiB "
        f"at {gib_per_hour:g} GiB an hour; they take {size_gib:.2f} GiB"
    )
    return mode, why


def _flops_per_s() -> float:
    size, repeats = 512, 8
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)
