"""`bitmill generate`: a packed model continues a text, or sums it up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from jobs.display import Display
from jobs.model_argument import locate, open_model
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.models.blocks import positions_of
from pipeline.models.build import read_config
from pipeline.models.device import this_device
from pipeline.package.manifest import MANIFEST, check
from pipeline.package.package import configuration
from pipeline.runtime import Runtime
from pipeline.runtime.build import check as check_graph
from pipeline.runtime.build import longest
from pipeline.tasks.chat import asked
from pipeline.tasks.summarization import ended, summaries
from pipeline.tasks.tokenizers import read_tokenizer

BEAMS = 6
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked of a model: temperature 0 takes the likeliest token each time; with `chat` the prompt is what a
    user says, and the text the assistant's answer."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    chat: bool = False


def generate(model: str, request: Request, resources: Resources, console: Console, say: Say) -> dict[str, Any]:
    """Say the text piece by piece; returns the document of `--json`."""
    with tempfile.TemporaryDirectory() as temporary:
        text, tokens = reply(locate(model, resources, Path(temporary) / "model"), request, console, say)
    return {"model": model, "prompt": request.prompt, "text": text, "tokens": tokens, "seed": request.seed}


def reply(folder: Path, request: Request, console: Console, say: Say) -> tuple[str, int]:
    """Return the text that the model of a folder writes, and its number of tokens; `say` hears each piece of it. A
    packed decoder runs on ONNX Runtime with its weights packed; beam search and plain directories run in torch."""
    packed = (folder / MANIFEST).exists()
    if packed:  # before anything in it is used
        check(folder)
    config = configuration(folder)[0] if packed else read_config(folder)
    tokenizer = read_tokenizer(folder)
    ids = asked(tokenizer, request.prompt) if request.chat else tokenizer(request.prompt)["input_ids"]
    if config.is_encoder_decoder:
        return _summary(open_model(folder).to(this_device()), tokenizer, ids, request, console, say)
    if packed:
        try:
            check_graph(config)
        except ConfigError as error:
            console.print(f"{error} It runs in torch.")
            packed = False
    positions = longest(config) if packed else positions_of(config)
    ids, length = _fitted(ids, tokenizer, positions, request, console)
    if packed:
        written = Runtime(folder).generate(ids, length, request.temperature, request.seed)
    else:
        written = _from_torch(folder, ids, length, request)
    pieces, generated = _Pieces(tokenizer, say), []
    for token in written:
        pieces.put(torch.tensor([token]))
        generated.append(token)
    pieces.end()
    say("\n")
    return tokenizer.decode(generated, skip_special_tokens=True), len(generated)


def _fitted(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, positions: int, request: Request, console: Console
) -> tuple[list[int], int]:
    """Return the prompt's tokens, and how many may follow."""
    if not ids:
        if tokenizer.bos_token_id is None:
            raise ConfigError("PROMPT is empty, and this model has no token that begins a text; give a prompt.")
        ids = [tokenizer.bos_token_id]
    if len(ids) >= positions:
        raise ConfigError(f"PROMPT has {len(ids)} tokens, and the model has {positions} positions; shorten it.")
    length = min(request.max_tokens, positions - len(ids))
    if length < request.max_tokens:
        console.print(f"the model's {positions} positions leave room for {length} tokens")
    return ids, length


def _from_torch(folder: Path, ids: list[int], length: int, request: Request) -> Iterator[int]:
    model = open_model(folder).to(this_device())
    sampled = {"do_sample": True, "temperature": request.temperature, "top_k": 0}
    ends = model.config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=length,
        eos_token_id=ends,
        pad_token_id=0 if ends is None else ends if isinstance(ends, int) else ends[0],
        **(sampled if request.temperature else {"do_sample": False}),
    )
    torch.manual_seed(request.seed)
    given = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        generated = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    yield from generated[0, len(ids) :].tolist()


def _summary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    request: Request,
    console: Console,
    say: Say,
) -> tuple[str, int]:
    """Sum up by beam search, as the task scores it; a source longer than the positions is cut, as in training."""
    positions = positions_of(model.config)
    if len(ids) > positions:
        console.print(f"the text has {len(ids)} tokens; the model reads the first {positions}")
    source = torch.tensor([ended(ids, tokenizer.eos_token_id, positions)], device=model.device)
    length = min(request.max_tokens + 1, positions)
    with Display(console) as display, display.stage("summary"):
        summary = summaries(model, source, torch.ones_like(source), length, BEAMS)
    text = tokenizer.decode(summary[0], skip_special_tokens=True)
    say(f"{text}\n")
    return text, summary.shape[1] - 1  # the first one starts the decoder


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands on whole words as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text)
