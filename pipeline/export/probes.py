"""What an export is tried on: texts as rows of tokens.

Without any text the packed model writes the rows itself, sampling from a random token, so that a package can be
verified with nothing but itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from pipeline.models.blocks import positions_of
from pipeline.models.build import decoding

PROMPTS, TOKENS = 20, 80
SEED = 0


@dataclass(frozen=True)
class Probes:
    """`rows` (prompts, width) of tokens; `sources` (prompts, length) is what an encoder reads."""

    rows: Tensor
    sources: Tensor | None = None


def width_of(config: PreTrainedConfig) -> int:
    """Return the tokens of a row; fewer where the model has fewer positions."""
    return min(TOKENS, positions_of(config))


def make_probes(model: PreTrainedModel, text: Tensor | None) -> Probes:
    """Make probes from rows of text (prompts, width), which an encoder reads, or from the model alone."""
    config, draw = model.config, torch.Generator().manual_seed(SEED)
    if config.is_encoder_decoder:
        sources = _drawn((PROMPTS, width_of(config)), config, draw) if text is None else text
        start = torch.full((len(sources), 1), int(config.decoder_start_token_id))
        return Probes(_sampled(model, start, sources), sources)
    if text is None:
        text = _sampled(model, _drawn((PROMPTS, 1), config, draw))
    return Probes(text)


def _drawn(shape: tuple[int, int], config: PreTrainedConfig, draw: torch.Generator) -> Tensor:
    """Return tokens drawn alike. Padding is not among them: it is no text, and has no position in some models."""
    pad = config.pad_token_id
    if pad is None:
        return torch.randint(config.vocab_size, shape, generator=draw)
    tokens = torch.randint(config.vocab_size - 1, shape, generator=draw)
    return tokens + (tokens >= pad)


def _sampled(model: PreTrainedModel, start: Tensor, sources: Tensor | None = None) -> Tensor:
    """Return whole rows that begin with `start`; no token ends the text, and none is padding."""
    steps, end, pad = width_of(model.config) - 1, model.config.eos_token_id, model.config.pad_token_id
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=0,
        eos_token_id=end,
        suppress_tokens=None if pad is None else [pad],
    )
    given = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    if sources is not None:
        given = {"input_ids": sources, "attention_mask": torch.ones_like(sources), "decoder_input_ids": start}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        generated: Tensor = model.generate(**given, **decoding(model), generation_config=settings)
    return generated[:, : steps + 1]
