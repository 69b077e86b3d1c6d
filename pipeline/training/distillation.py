"""What a student learns from its teacher in a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config.training import Distill
from pipeline.distill import negatives
from pipeline.distill.losses import contrastive_loss
from pipeline.distill.memory_bank import MemoryBank
from pipeline.distill.transfer import sent
from pipeline.errors import RunError
from pipeline.models.device import bf16_on_gpu
from pipeline.store.shards import Stored
from pipeline.tasks.batch import Batch

ReadRow = Callable[[int], tuple[Batch, Stored | None]]  # a row by its id, with what is cached of the teacher


@dataclass
class Distillation:
    """What turns next-token training into distillation.

    `teacher` gives the last states and those of the contrast layer, (sequences, length, hidden) each, for a batch's
    inputs where nothing is cached; `head` turns last states into the teacher's logits, and is None where tokens drawn
    from them are cached. `contrastive` is `contrastive_loss`, compiled or as it is.
    """

    recipe: Distill
    head: nn.Module | None
    teacher: Callable[..., tuple[Tensor, Tensor]] | None
    bank: MemoryBank
    contrastive: Callable[..., tuple[Tensor, Tensor]] = contrastive_loss

    @torch.no_grad()
    def taught(self, batch: Batch, cached: Stored | None) -> tuple[Tensor, Tensor]:
        """Return what is known of the teacher at each position of a micro-batch, (sequences, length, width): its last
        states and those of the contrast layer, cached or computed now, in bf16 on a GPU; or, twice, the tokens cached
        that were drawn from it, where nothing is contrasted."""
        if self.teacher is not None:
            with bf16_on_gpu(batch.ids.device):
                return self.teacher(*batch.inputs)
        if cached is None:
            raise RunError("Distillation has neither a cache nor a teacher to run.")
        values = cached.to(batch.ids.device).wide().reshape(*batch.ids.shape, -1)
        return values, values

    def contrast(
        self, step: int, rows: Tensor, row_ids: list[int], batch: Batch, teacher: Tensor, states: Tensor, read: ReadRow
    ) -> Tensor:
        """Return the contrastive loss of a micro-batch, nats, and keep the student's states for the memory bank.

        Args:
            step: optimizer step. rows: row ids of the whole global batch. row_ids: those of this micro-batch.
            teacher, states: the teacher's and the student's states of the contrast layer.
            read: gives any row of the global batch, for `negatives_from: batch`.
        """
        apart = self._negatives(step, rows, row_ids, batch, teacher, states, read)
        query = self.bank.query(batch.ids, states)
        nats, _ = self.contrastive(query, teacher, batch.valid, apart, self.recipe.temperature)
        self.bank.accumulate(batch.on_host.ids, states, batch.on_host.valid)
        return nats

    def _negatives(
        self,
        step: int,
        rows: Tensor,
        row_ids: list[int],
        batch: Batch,
        teacher: Tensor,
        student: Tensor,
        read: ReadRow,
    ) -> negatives.Negatives:
        """Return the negatives, as `negatives_from` says, of the sequences of a micro-batch; the student's own states
        let the gradient through on both sides."""
        seed, count, chosen = self.recipe.seed, self.recipe.negatives, self.recipe.negatives_from
        sequences = [row * batch.group + place for row in row_ids for place in range(batch.group)]
        if chosen in ("teacher", "student"):
            lengths = batch.on_host.lengths.tolist()
            offsets = [
                negatives.draw_offsets(seed, step, sequence, length, count)
                for sequence, length in zip(sequences, lengths, strict=True)
            ]
            return negatives.other_positions(teacher if chosen == "teacher" else student, batch.lengths, offsets)
        if chosen == "vocabulary":
            seen = self.bank.seen_ids
            draws = [seen[negatives.draw_ids(seed, step, sequence, len(seen), count + 1)] for sequence in sequences]
            drawn = sent(torch.stack(draws), batch.ids.device)
            return negatives.other_tokens(self.bank.states[drawn], batch.ids, drawn)
        pools = [self._of_partner(step, rows, row, place, read) for row in row_ids for place in range(batch.group)]
        return negatives.pooled([teacher[0, :0] if pool is None else pool for pool in pools])

    def _of_partner(self, step: int, rows: Tensor, row: int, place: int, read: ReadRow) -> Tensor | None:
        """Return states of another row of the global batch, at the same place; None if there is no other."""
        partner = negatives.draw_partner(self.recipe.seed, step, row, rows)
        if partner is None:
            return None
        others, cached = read(partner)
        _, states = self.taught(others, cached)
        sequence, length = row * others.group + place, int(others.on_host.lengths[place])
        positions = negatives.draw_positions(self.recipe.seed, step, sequence, length, self.recipe.negatives)
        return states[place, sent(positions, states.device)]
