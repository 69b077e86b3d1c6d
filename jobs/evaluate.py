"""`bitmill evaluate`: score any package or Hugging Face directory by the protocol of the pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig

from jobs.display import Display, print_table
from jobs.model_argument import locate, open_model
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.models.device import this_device
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_text
from pipeline.sources.text import documents, parts
from pipeline.tasks.language_modeling import PROTOCOL, encode, score
from pipeline.tasks.tokenizers import read_tokenizer, token_bytes


def evaluate(
    model: str,
    data: str,
    block_length: int | None,
    unit: str,
    text_column: str,
    batch: int,
    resources: Resources,
    console: Console,
) -> dict[str, Any]:
    """Score a model on all of a text; returns the document of `--json`."""
    with tempfile.TemporaryDirectory() as temporary:
        files = pin_text(data, "--data", ContentMemo(f"{temporary}/text"))
        folder = locate(model, resources, Path(temporary) / "model")
        loaded, tokenizer = open_model(folder).to(this_device()), read_tokenizer(folder)
        width = _width(model, loaded.config, block_length)
        texts = (text for file in files for part in parts(file) for text in documents(part, unit, text_column))
        ids, lengths, _ = encode(texts, tokenizer, width, unit)
        if lengths.sum() < 2:
            raise ConfigError(f"--data {data!r} holds {int(lengths.sum())} tokens; at least 2 are needed.")
        rows = torch.from_numpy(ids).long(), torch.from_numpy(lengths).long()
        with Display(console) as display, display.stage("rows") as advance:
            scores, _ = score(_batches(*rows, batch, advance), loaded, token_bytes(tokenizer))
    protocol = f"block length {width}: {PROTOCOL}"
    document = {"model": model, "data": data, "protocol": protocol, "tokens": sum(scores.tokens)}
    values = ((name, f"{value:.4f}") for name, value in scores.metrics().items())
    print_table(console, ("metric", "value"), values, title=f"{model} on {data}")
    console.print(f"{document['tokens']:,} tokens; {protocol}")
    return document | {"metrics": scores.metrics()}


def _width(model: str, config: PreTrainedConfig, block_length: int | None) -> int:
    """Count the tokens of a block. Raises ConfigError for a model that text does not measure, or too long a block."""
    if config.is_encoder_decoder:
        raise ConfigError(
            f"MODEL is {model!r}, an encoder and a decoder, which running text does not measure. Its ROUGE is in its "
            "manifest.json; to score it again, give bitmill compress its configuration with another data.test."
        )
    longest = int(getattr(config, "max_position_embeddings", 512))
    width = block_length or min(512, longest)
    if width > longest:
        raise ConfigError(f"--block-length is {width}, and the model has {longest} positions; lower it.")
    return width


def _batches(
    ids: Tensor, lengths: Tensor, batch: int, advance: Callable[[int, int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(ids), batch):
        yield ids[start : start + batch], lengths[start : start + batch]
        advance(min(start + batch, len(ids)), len(ids))
