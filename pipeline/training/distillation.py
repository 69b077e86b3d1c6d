"""What the student learns from its teacher in one micro-batch: sums of nats over valid tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config.training import Distill
from pipeline.distill import negatives
from pipeline.distill.losses import contrastive_loss, valid_tokens
from pipeline.distill.memory_bank import MemoryBank
from pipeline.errors import RunError
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import CONTRAST, distilling_losses

ReadRow = Callable[[int], tuple[Batch, Tensor | None]]  # a row by its id, with its states where they are cached


@dataclass
class Distillation:
    """What turns next-token training into distillation.

    `teacher` gives the last states and those of the contrast layer, (sequences, length, hidden) each, for a batch's
    inputs where they are not cached; `head` turns last states into the teacher's logits.
    """

    recipe: Distill
    head: nn.Module
    teacher: Callable[..., tuple[Tensor, Tensor]] | None
    bank: MemoryBank

    def losses(
        self,
        step: int,
        rows: Tensor,
        row_ids: list[int],
        batch: Batch,
        cached: Tensor | None,
        states: Tensor,
        logits: Tensor,
        read: ReadRow,
    ) -> dict[str, Tensor]:
        """Return the losses of a micro-batch by name, each a sum in nats.

        Args:
            step: optimizer step. rows: row ids of the whole global batch. row_ids: those of this micro-batch.
            batch, cached: what the rows hold. states, logits: the student's, states of its contrast layer.
            read: gives any row of the global batch, for `negatives_from: batch`.
        """
        with torch.no_grad():
            last, layer = self._teacher_states(batch, cached)
            teacher_logits = self.head(last)
        losses = distilling_losses(logits, teacher_logits, batch)
        contrast = states.new_zeros((), dtype=torch.float64)
        if self.recipe.contrast_weight:
            apart = [
                self._negatives(step, rows, row_ids[i // batch.group], batch, i, layer[i], states[i], read)
                for i in range(len(row_ids) * batch.group)
            ]
            query = self.bank.query(batch.ids, states)
            contrast, _ = contrastive_loss(query, layer, batch.lengths, apart, self.recipe.temperature)
            self.bank.accumulate(batch.ids, states, valid_tokens(batch.lengths, batch.ids.shape[1]))
        return losses | {CONTRAST: contrast}

    def _negatives(
        self, step: int, rows: Tensor, row: int, batch: Batch, i: int, teacher: Tensor, student: Tensor, read: ReadRow
    ) -> negatives.Negatives:
        """Return the negatives, as `negatives_from` says, of a row's sequence that is number `i` of the batch; the
        student's own states let the gradient through on both sides."""
        seed, count, chosen = self.recipe.seed, self.recipe.negatives, self.recipe.negatives_from
        place = i % batch.group
        sequence = row * batch.group + place
        ids = batch.ids[i, : int(batch.lengths[i])]
        if chosen in ("teacher", "student"):
            offsets = negatives.draw_offsets(seed, step, sequence, len(ids), count)
            return negatives.other_positions(teacher if chosen == "teacher" else student, len(ids), offsets)
        if chosen == "vocabulary":
            seen = self.bank.seen.nonzero()[:, 0]
            drawn = seen[negatives.draw_ids(seed, step, sequence, len(seen), count + 1).to(seen.device)]
            return negatives.other_tokens(self.bank.states[drawn], ids, drawn)
        partner = negatives.draw_partner(seed, step, row, rows)
        if partner is None:
            return negatives.Negatives(teacher[:0])
        others, cached = read(partner)
        with torch.no_grad():
            _, states = self._teacher_states(others, cached)
        positions = negatives.draw_positions(seed, step, sequence, int(others.lengths[place]), count)
        return negatives.Negatives(states[place, positions])

    def _teacher_states(self, batch: Batch, cached: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.teacher is not None:
            return self.teacher(*batch.inputs)
        if cached is None:
            raise RunError("Distillation has neither cached states nor a teacher to run.")
        states = cached.to(batch.ids.device).reshape(*batch.ids.shape, -1)
        return states, states
