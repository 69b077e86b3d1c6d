"""What the student learns from its teacher in one micro-batch: sums of nats over valid tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import Distill
from pipeline.distill.losses import contrastive_loss, logit_distillation_loss, valid_tokens
from pipeline.distill.memory_bank import MemoryBank
from pipeline.distill.negatives import (
    Negatives,
    draw_ids,
    draw_offsets,
    draw_partner,
    draw_positions,
    other_positions,
)
from pipeline.errors import RunError

# Row id to token ids (1, length), lengths (1,) and, where they are cached, the teacher's states (1, length, hidden).
ReadRow = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class Distillation:
    """What turns next-token training into distillation.

    `teacher` gives the last states and those of the contrast layer, (batch, length, hidden) each, for ids where they
    are not cached; `head` turns last states into the teacher's logits.
    """

    recipe: Distill
    head: nn.Module
    teacher: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    bank: MemoryBank

    def losses(
        self,
        step: int,
        batch: Tensor,
        row_ids: list[int],
        ids: Tensor,
        lengths: Tensor,
        cached: Tensor | None,
        states: Tensor,
        logits: Tensor,
        read: ReadRow,
    ) -> tuple[Tensor, Tensor]:
        """Sums of logit distillation and of contrast over the rows of a micro-batch.

        Args:
            step: optimizer step. batch: row ids of the whole global batch. row_ids: those of this micro-batch.
            ids, lengths, cached: what the rows hold. states, logits: the student's, of its contrast layer.
            read: gives any row of the batch, for `negatives_from: batch`.
        """
        with torch.no_grad():
            last, layer = self._teacher_states(ids, cached)
            teacher_logits = self.head(last)
        valid = valid_tokens(lengths, ids.shape[1])
        logit, _ = logit_distillation_loss(logits, teacher_logits, valid)
        if not self.recipe.contrast_weight:
            return logit, logit.new_zeros(())
        negatives = [
            self._negatives(step, batch, row, layer[place], states[place], int(lengths[place]), read)
            for place, row in enumerate(row_ids)
        ]
        query = self.bank.query(ids, states)
        contrast, _ = contrastive_loss(query, layer, lengths, negatives, self.recipe.temperature)
        self.bank.accumulate(ids, states, valid)
        return logit, contrast

    def _negatives(
        self, step: int, batch: Tensor, row: int, teacher: Tensor, student: Tensor, length: int, read: ReadRow
    ) -> Negatives:
        """As `negatives_from` says; the student's own states let the gradient through on both sides."""
        seed, count, chosen = self.recipe.seed, self.recipe.negatives, self.recipe.negatives_from
        if chosen in ("teacher", "student"):
            offsets = draw_offsets(seed, step, row, length, count)
            return other_positions(teacher if chosen == "teacher" else student, length, offsets)
        if chosen == "vocabulary":
            drawn = draw_ids(seed, step, row, len(self.bank.seen), count).to(teacher.device)
            return Negatives(self.bank.states[drawn[self.bank.seen[drawn]]])
        partner = draw_partner(seed, step, row, batch)
        if partner is None:
            return Negatives(teacher[:0])
        ids, lengths, cached = read(partner)
        with torch.no_grad():
            _, states = self._teacher_states(ids.to(teacher.device), cached)
        return Negatives(states[0, draw_positions(seed, step, row, int(lengths[0]), count)])

    def _teacher_states(self, ids: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.teacher is not None:
            return self.teacher(ids)
        if cached is None:
            raise RunError("Distillation has neither cached states nor a teacher to run.")
        states = cached.to(ids.device)
        return states, states
