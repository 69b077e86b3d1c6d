"""Losses as (sum, count): nats summed over valid tokens, and how many there were. The caller divides once. Tokens are
computed in fp32 and summed in fp64, so that the grouping of a batch does not show."""

from __future__ import annotations

from collections.abc import Sequence

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


def contrastive_loss(
    query: Tensor, teacher: Tensor, lengths: Tensor, negatives: Sequence[Negatives], temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the token-level contrastive loss (Tao et al. 2022, section 3.2), nats over valid tokens.

    The positive of token i is the teacher's state at i. A token without negatives adds nothing.

    Args:
        query: (batch, length, hidden), the student's states mixed with the memory bank.
        teacher: (batch, length, hidden).
        lengths: (batch,), valid tokens of each row.
        negatives: those of each row.
        temperature: tau.
    """
    query, teacher = F.normalize(query.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    total = query.new_zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        tokens = query[row, :length]
        positive = (tokens * teacher[row, :length]).sum(-1, keepdim=True)
        scores = tokens @ F.normalize(negatives[row].pool.float(), dim=-1).T
        index = negatives[row].index
        candidates = torch.cat([positive, scores if index is None else scores.gather(1, index)], dim=1) / temperature
        total = total - candidates.log_softmax(-1)[:, 0].sum(dtype=torch.float64)
    return total, lengths.sum()


def valid_tokens(lengths: Tensor, width: int) -> Tensor:
    """Return the mask (batch, width) bool: True where a token is not padding."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
