"""What an export is tried on: rows of tokens, and the packed model's greedy path from the beginning of each.

Without a text the model writes the rows itself, by sampling from a random token, so that a package can be verified
with nothing but itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

PROMPTS, PROMPT_TOKENS, STEPS = 20, 16, 64
SEED = 0


@dataclass(frozen=True)
class Probes:
    """`rows` (prompts, width) for the perplexity; `paths` (prompts, prompt + steps), of which the last `steps` were
    chosen by the packed model; `sources` (prompts, length) is what an encoder reads."""

    rows: Tensor
    paths: Tensor
    steps: int
    sources: Tensor | None = None


def lengths(positions: int) -> tuple[int, int]:
    """Return the tokens of a prompt and the steps after it; fewer where the model has fewer positions."""
    prompt = min(PROMPT_TOKENS, max(1, positions // 4))
    return prompt, min(STEPS, positions - prompt)


def make_probes(model: PreTrainedModel, text: Tensor | None) -> Probes:
    """Make probes from rows of text (prompts, prompt + steps), or from the model alone."""
    prompt, steps = lengths(int(model.config.max_position_embeddings))
    draw = torch.Generator().manual_seed(SEED)
    if model.config.is_encoder_decoder:
        sources = torch.randint(model.config.vocab_size, (PROMPTS, prompt), generator=draw) if text is None else text
        start = torch.full((len(sources), 1), int(model.config.decoder_start_token_id))
        rows = _continued(model, start, steps - 1, sample=True, sources=sources)
        return Probes(rows, _continued(model, start, steps - 1, False, sources), steps - 1, sources)
    if text is None:
        start = torch.randint(model.config.vocab_size, (PROMPTS, 1), generator=draw)
        text = _continued(model, start, prompt + steps - 1, sample=True)
    return Probes(text, _continued(model, text[:, :prompt], steps, sample=False), steps)


def _continued(
    model: PreTrainedModel, start: Tensor, steps: int, sample: bool, sources: Tensor | None = None
) -> Tensor:
    """Return `start` and the tokens that follow it; none of them ends the text."""
    end = model.config.eos_token_id
    settings = GenerationConfig(
        do_sample=sample, top_k=0, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0, eos_token_id=end
    )
    given = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    if sources is not None:
        given = {"input_ids": sources, "attention_mask": torch.ones_like(sources), "decoder_input_ids": start}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        generated: Tensor = model.generate(**given, generation_config=settings)
    return generated[:, : start.shape[1] + steps]
