"""Tokens drawn from a teacher's distribution, which is all that distillation needs to know of it on average.

Of a position's distribution p so many tokens are drawn, with replacement, that the share of the draws which a token has
is expected to be its probability. Cross-entropy to the tokens drawn, and its gradient, then are what they are expected
to be to p, where the most likely tokens alone would give another optimum (Anshumann et al., "Sparse Logit Sampling",
ACL 2025). Draws are not independent of each other, as there, but at equal distances along the cumulative distribution,
from a random start (systematic sampling): as little biased, and a token is drawn as often as its probability says, but
for less than once. The start depends on what the row holds alone, neither on the batch nor on the worker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.distill.random import draw


def starts(rows: Tensor) -> Tensor:
    """Return for each position of rows of ids (sequences, length), on the host, a number in [0, 1), fp32, which is
    random and depends on the row's ids and the position alone."""
    return torch.stack([torch.rand(len(row), generator=draw("draws", *row)) for row in rows.tolist()])


def drawn(logits: Tensor, start: Tensor, draws: int) -> Tensor:
    """Return the tokens of so many draws (sequences, length, draws), int64, in order, from the distributions of logits
    (sequences, length, vocabulary), by the numbers of `starts` (sequences, length)."""
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    levels = (torch.arange(draws, device=start.device) + start.double().unsqueeze(-1)) / draws
    return torch.searchsorted(cumulative, levels * cumulative[..., -1:], right=True)
