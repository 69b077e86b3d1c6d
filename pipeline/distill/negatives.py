"""Which representations the contrastive loss pushes a token away from. All draws are a function of (seed, step, row),
never of the worker or the place in a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distill.random import draw


@dataclass(frozen=True)
class Negatives:
    """The negatives of one sequence's tokens. `pool` is (candidates, hidden); `index` (length, negatives) says which of
    them each token takes, None: all."""

    pool: Tensor
    index: Tensor | None = None


def other_positions(states: Tensor, length: int, offsets: Tensor) -> Negatives:
    """Return for token i the states at (i + offset) mod length of its own sequence; states (>= length, hidden)."""
    positions = torch.arange(length, device=states.device).unsqueeze(1)
    return Negatives(states[:length], (positions + offsets.to(states.device)) % length)


def draw_offsets(seed: int, step: int, row_id: int, length: int, negatives: int) -> Tensor:
    """Draw the offsets of a token's negatives: min(negatives, length - 1) distinct whole numbers in 1..length-1."""
    return torch.randperm(max(length - 1, 0), generator=draw("negatives", seed, step, row_id))[:negatives] + 1


def other_tokens(known: Tensor, ids: Tensor, drawn: Tensor) -> Negatives:
    """Return for each token of ids (length,) the states of the drawn ids, less its own: one fewer than drawn. `known`
    (drawn, hidden) is a state for each of `drawn` (drawn,), distinct ids of the vocabulary."""
    own = drawn.unsqueeze(0) == ids.unsqueeze(1)
    return Negatives(known, own.int().argsort(dim=1, stable=True)[:, :-1])


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
