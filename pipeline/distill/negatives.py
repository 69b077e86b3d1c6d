"""Which representations the contrastive loss pushes a token away from. All draws are a function of (seed, step, row),
never of the worker or the place in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.distill.random import draw
from pipeline.distill.transfer import sent


@dataclass(frozen=True)
class Negatives:
    """The negatives of the tokens of several sequences.

    `pool` is (sequences, candidates, hidden); `index` (sequences, length, negatives) says which of them a token takes,
    None: all; `taken`, bool (sequences, length or 1, negatives), is false where there is none, None: nowhere.
    """

    pool: Tensor
    index: Tensor | None
    taken: Tensor | None


def other_positions(states: Tensor, lengths: Tensor, offsets: Sequence[Tensor]) -> Negatives:
    """Return for token i the states at (i + offset) mod length of its own sequence; states (sequences, at least length,
    hidden), lengths (sequences,) and the offsets of each sequence."""
    drawn, taken = _padded(offsets, states.device)
    positions = torch.arange(states.shape[1], device=states.device).view(1, -1, 1) + drawn.unsqueeze(1)
    return Negatives(states, positions % lengths.to(states.device).clamp(min=1).view(-1, 1, 1), taken)


def other_tokens(known: Tensor, ids: Tensor, drawn: Tensor) -> Negatives:
    """Return for each token of ids (sequences, length) the states of the ids drawn for its sequence, less its own: one
    fewer than drawn. `known` (sequences, drawn, hidden) is a state for each of `drawn` (sequences, drawn), distinct ids
    of the vocabulary."""
    own = drawn.unsqueeze(1) == ids.unsqueeze(2)
    last = torch.arange(drawn.shape[1], device=drawn.device) == drawn.shape[1] - 1
    return Negatives(known, None, ~own & (own.any(-1, keepdim=True) | ~last))


def pooled(pools: Sequence[Tensor]) -> Negatives:
    """Return as negatives of all tokens of each sequence the states (negatives, hidden) that are its pool."""
    most = max(map(len, pools))
    padded = torch.stack([F.pad(pool, (0, 0, 0, most - len(pool))) for pool in pools])
    return Negatives(padded, None, _taken([len(pool) for pool in pools], padded.device))


def _padded(draws: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return draws side by side, filled up with zeros, and which are none of these."""
    taken = _taken([*map(len, draws)], device)
    rows = torch.stack(list(draws)) if taken is None else pad_sequence(list(draws), batch_first=True)
    return sent(rows, device), taken


def _taken(counts: Sequence[int], device: torch.device) -> Tensor | None:
    """Return the mask (sequences, 1, most) of so many negatives each; None if all have as many."""
    if len({*counts}) == 1:
        return None
    mask = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
    return sent(mask.unsqueeze(1), device)


def draw_offsets(seed: int, step: int, row_id: int, length: int, negatives: int) -> Tensor:
    """Draw the offsets of a token's negatives: min(negatives, length - 1) distinct whole numbers in 1..length-1."""
    return torch.randperm(max(length - 1, 0), generator=draw("negatives", seed, step, row_id))[:negatives] + 1


def draw_ids(seed: int, step: int, row_id: int, seen: int, count: int) -> Tensor:
    """Draw which of the ids seen so far are negatives of a row: min(count, seen) distinct numbers below `seen`."""
    return torch.randperm(seen, generator=draw("vocabulary", seed, step, row_id))[:count]


def draw_partner(seed: int, step: int, row_id: int, batch: Tensor) -> int | None:
    """Draw another row of the global batch, whose tokens serve as negatives; None if there is no other."""
    others = batch[batch != row_id]
    if not len(others):
        return None
    return int(others[torch.randint(len(others), (), generator=draw("partner", seed, step, row_id))])


def draw_positions(seed: int, step: int, row_id: int, length: int, negatives: int) -> Tensor:
    """Draw distinct positions of another row that serve as negatives."""
    return torch.randperm(length, generator=draw("positions", seed, step, row_id))[:negatives]
