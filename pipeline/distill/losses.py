"""Losses as (sum, count): nats summed over valid tokens, and how many there were. The caller divides once. Tokens are
computed in fp32 and summed in fp64, so that the grouping of a batch does not show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distill.negatives import Negatives


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
    query, positives = (F.normalize(states.float(), dim=-1) for states in (query, teacher))
    pool = positives if negatives.pool is teacher else F.normalize(negatives.pool.float(), dim=-1)
    positive = (query * positives).sum(-1, keepdim=True)
    scores = query @ pool.mT
    if negatives.index is not None:
        scores = scores.gather(2, negatives.index)
    candidates = torch.cat([positive, scores.masked_fill(~negatives.taken, -torch.inf)], dim=-1) / temperature
    nats = -candidates.log_softmax(-1)[..., 0]
    return (nats * valid).sum(dtype=torch.float64), valid.sum()


def valid_tokens(lengths: Tensor, width: int) -> Tensor:
    """Return the mask (batch, width) bool: True where a token is not padding."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
