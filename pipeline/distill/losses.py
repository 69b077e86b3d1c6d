"""Losses as (sum, count): nats summed over valid tokens, and how many there were. The caller divides once. Tokens are
computed in fp32 and summed in fp64, so that the grouping of a batch does not show."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distill.negatives import Negatives

SHORTEST = 1e-12  # length that states are divided by


def target_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy, nats, of targets (batch, at most length), the token that each position predicts, where
    `valid`, bool, as targets; logits (batch, length, vocabulary)."""
    return (target_nats(logits, targets) * valid).sum(dtype=torch.float64), valid.sum()


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy, nats, of each target of `target_loss`, as targets."""
    predicted = logits[:, : targets.shape[1]].float().flatten(0, 1)
    return F.cross_entropy(predicted, targets.flatten(), reduction="none").view_as(targets)


def logit_distillation_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return - sum_i softmax(z^t_i) . log softmax(z^s_i) over valid tokens, nats (Tao et al. 2022, section 3.4). Its
    minimum over the student is the teacher's entropy. `valid` is (batch, length) bool."""
    nats = -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1)
    return (nats * valid).sum(dtype=torch.float64), valid.sum()


def drawn_distillation_loss(student: Tensor, drawn: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `logit_distillation_loss` is expected to be over draws from the teacher, nats: the mean over the
    tokens drawn at a position, int64 (batch, length, draws), of the student's cross-entropy. That of the same draws has
    its minimum where the student gives their shares, below the teacher's entropy."""
    nats = -student.float().log_softmax(-1).gather(-1, drawn).mean(-1)
    return (nats * valid).sum(dtype=torch.float64), valid.sum()


def contrastive_loss(
    query: Tensor, teacher: Tensor, valid: Tensor, negatives: Negatives, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the token-level contrastive loss (Tao et al. 2022, section 3.2), nats over valid tokens.

    The positive of token i is the teacher's state at i. A token without negatives adds nothing.

    Args:
        query: (batch, length, hidden), the student's states mixed with the memory bank.
        teacher: (batch, length, hidden).
        valid: (batch, length) bool.
        negatives: those of all rows.
        temperature: tau.
    """
    query, positives = (directions(states.float()) for states in (query, teacher))
    pool = positives if negatives.pool is teacher else directions(negatives.pool.float())
    positive = (query * positives).sum(-1, keepdim=True)
    scores = query @ pool.mT
    if negatives.index is not None:
        scores = scores.gather(2, negatives.index)
    if negatives.taken is not None:
        scores = scores.masked_fill(~negatives.taken, -torch.inf)
    candidates = torch.cat([positive, scores], dim=-1) / temperature
    nats = -candidates.log_softmax(-1)[..., 0]
    return (nats * valid).sum(dtype=torch.float64), valid.sum()


def directions(states: Tensor) -> Tensor:
    """Return states over their lengths, along the last axis; zeros stay zeros. With y = x / |x| the gradient is
    (g - y (y . g)) / |x|, which takes a third of the operations that go through the length's own."""
    return cast(Tensor, _Directions.apply(states))  # type: ignore[no-untyped-call]


class _Directions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp_(min=SHORTEST)
        of_length_one: Tensor = states / lengths
        ctx.save_for_backward(of_length_one, lengths)
        return of_length_one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        of_length_one, lengths = ctx.saved_tensors
        along = (grad * of_length_one).sum(-1, keepdim=True)
        return torch.addcmul(grad, of_length_one, along, value=-1).div_(lengths)


def valid_tokens(lengths: Tensor, width: int) -> Tensor:
    """Return the mask (batch, width) bool: True where a token is not padding."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
