"""The losses of a batch, each a sum in nats; `Task.counts` says what each is divided by.

Candidates of next_utterance are scored without a head of their own: a candidate's score is the mean log-probability
of its reply tokens, end-of-text included, given the context; the softmax over candidates takes it as it is, since a
sharper one (five times the scores, tried) disturbs the tokens' loss before there is anything to choose by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.distill.losses import drawn_distillation_loss, logit_distillation_loss, target_loss, target_nats
from pipeline.models.hidden_states import head_product, teachers_logits
from pipeline.tasks.batch import Batch

NEXT_TOKEN, DISTILLATION, CONTRAST = "next_token_nats", "distillation_nats", "contrastive_nats"
CANDIDATES = "candidates_nats"
TEACHING = (NEXT_TOKEN, CANDIDATES)  # losses of full-precision training, where the task has them
DISTILLING = (DISTILLATION, CONTRAST, CANDIDATES)


def losses_of_logits(
    head: nn.Module, prepared: Tensor, batch: Batch, teacher: tuple[nn.Module | None, Tensor] | None, bf16: bool
) -> dict[str, Tensor]:
    """Return the losses that are computed from logits, of what `head_input` gave for the student's head; with a
    teacher, its head and last states, or no head and tokens drawn from it, they are those of distillation. `bf16` has
    the student's product so; the teacher's is on every GPU."""
    with torch.autocast(prepared.device.type, torch.bfloat16, enabled=bf16):
        logits = head_product(head, prepared)
    if teacher is None:
        return teaching_losses(logits, batch)
    teachers_head, given = teacher
    if teachers_head is None:
        return {DISTILLATION: drawn_distillation_loss(logits, given, batch.distilled)[0]}
    with torch.no_grad():
        reference = teachers_logits(teachers_head, given)
    return distilling_losses(logits, reference, batch)


def teaching_losses(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return the next-token nats of the reference of each row and, where a row has candidates, nats of choosing it."""
    losses = {NEXT_TOKEN: reference_nats(logits, batch)[0]}
    if batch.group > 1:
        losses[CANDIDATES] = -candidate_scores(logits, batch).log_softmax(-1)[:, 0].sum()
    return losses


def distilling_losses(student: Tensor, teacher: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return the nats of logit distillation and, where a row has candidates, of the teacher's choice among them."""
    losses = {DISTILLATION: logit_distillation_loss(student, teacher, batch.distilled)[0]}
    if batch.group > 1:
        ours = candidate_scores(student, batch).log_softmax(-1)
        losses[CANDIDATES] = -(candidate_scores(teacher, batch).softmax(-1) * ours).sum()
    return losses


def reference_nats(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return sum and count of the next-token nats of each row's first sequence."""
    first = batch.references()
    return target_loss(logits[:: batch.group], first.targets, first.supervised)


def candidate_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean log-probability of each candidate's reply, nats per token, fp64 (rows, candidates)."""
    nats = target_nats(logits, batch.targets)
    return -((nats * batch.supervised).sum(1, dtype=torch.float64) / batch.supervised.sum(1)).view(-1, batch.group)
