"""`bitmill generate`: a packed model continues a text, or sums it up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from jobs.evaluate import locate, open_model
from pipeline.config import Resources
from pipeline.errors import ConfigError
from pipeline.tasks.summarization import ended, summaries
from pipeline.tasks.tokenizers import read_tokenizer

BEAMS = 6
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked of a model: temperature 0 takes the likeliest token each time."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int


def generate(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    resources: Resources,
    console: Console,
    say: Say,
) -> dict[str, Any]:
    """Say the text piece by piece; returns the document of `--json`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = locate(model, resources, Path(temporary) / "model")
        text, tokens = reply(folder, Request(prompt, max_tokens, temperature, seed), console, say)
    return {"model": model, "prompt": prompt, "text": text, "tokens": tokens, "seed": seed}


def reply(folder: Path, request: Request, console: Console, say: Say) -> tuple[str, int]:
    """The text that the model of a folder writes, and its number of tokens; `say` hears each piece of it."""
    model, tokenizer = open_model(folder), read_tokenizer(folder)
    ids = tokenizer(request.prompt)["input_ids"]
    if model.config.is_encoder_decoder:
        return _summary(model, tokenizer, ids, request, console, say)
    return _continuation(model, tokenizer, ids, request, console, say)


def _continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    request: Request,
    console: Console,
    say: Say,
) -> tuple[str, int]:
    positions = int(model.config.max_position_embeddings)
    if not ids:
        if tokenizer.bos_token_id is None:
            raise ConfigError("PROMPT is empty, and this model has no token that begins a text; give a prompt.")
        ids = [tokenizer.bos_token_id]
    if len(ids) >= positions:
        raise ConfigError(f"PROMPT has {len(ids)} tokens, and the model has {positions} positions; shorten it.")
    length = min(request.max_tokens, positions - len(ids))
    if length < request.max_tokens:
        console.print(f"the model's {positions} positions leave room for {length} tokens", highlight=False)
    sampled = {"do_sample": True, "temperature": request.temperature, "top_k": 0}
    how = GenerationConfig(
        max_new_tokens=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampled if request.temperature else {"do_sample": False}),
    )
    torch.manual_seed(request.seed)
    given = torch.tensor([ids])
    with torch.no_grad():
        streamer = _Pieces(tokenizer, say)
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=how, streamer=streamer)
    say("\n")
    written = found[0, len(ids) :]
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


def _summary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    request: Request,
    console: Console,
    say: Say,
) -> tuple[str, int]:
    """Beam search, as the task scores it; a source longer than the model's positions is cut, as in training."""
    positions = int(model.config.max_position_embeddings)
    if len(ids) > positions:
        console.print(f"the text has {len(ids)} tokens; the model reads the first {positions}", highlight=False)
    source = torch.tensor([ended(ids, tokenizer.eos_token_id, positions)])
    length = min(request.max_tokens + 1, positions)
    found = summaries(model, source, torch.ones_like(source), length, BEAMS)
    text = tokenizer.decode(found[0], skip_special_tokens=True)
    say(f"{text}\n")
    return text, found.shape[1] - 1  # the first one starts the decoder


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands on whole words as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text)
