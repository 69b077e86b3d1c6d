"""The memory bank of the contrastive loss: one momentum-averaged student state per vocabulary id.

Our reading of Tao et al. 2022, section 3.2: q_i = m * bank[id_i] + (1 - m) * h_i, with the gradient through h_i
only; once per optimizer step bank[id] <- m * bank[id] + (1 - m) * mean of the step's h over that id. An id seen
for the first time is its own query and enters the bank as its mean. All queries of a step read the bank of the
step before, whatever the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], list[Tensor]]


class MemoryBank:
    """State (vocabulary, hidden) fp32 and which ids were seen, the same on every worker."""

    def __init__(self, vocabulary: int, hidden: int, momentum: float, device: torch.device | str = "cpu") -> None:
        self.momentum = momentum
        self.states = torch.zeros(vocabulary, hidden, device=device)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._added: list[tuple[Tensor, Tensor]] = []  # ids and states of this step

    def query(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return the queries q (batch, length, hidden) for ids (batch, length) and the student's states."""
        mixed = self.momentum * self.states[ids] + (1 - self.momentum) * states.float()
        return torch.where(self.seen[ids].unsqueeze(-1), mixed, states.float())

    @torch.no_grad()
    def accumulate(self, ids: Tensor, states: Tensor, valid: Tensor) -> None:
        """Add one micro-batch's valid states to the sums of this step."""
        self._added.append((ids[valid], states[valid].float()))

    @torch.no_grad()
    def update(self, gather: Gather = lambda tensor: [tensor]) -> None:
        """Reduce the sums of all workers in rank order, move the bank, forget them: the end of the optimizer step.
        `gather` returns a tensor's value on every rank, in rank order; first dimensions may differ."""
        ids, states = (torch.cat(parts) for parts in zip(*self._added, strict=True))
        unique, inverse = ids.unique(return_inverse=True)
        sums = states.new_zeros(len(unique), states.shape[1]).index_add_(0, inverse, states)
        counts = torch.bincount(inverse, minlength=len(unique)).to(sums.dtype)
        self._move(gather(unique), gather(sums), gather(counts))
        self._added.clear()

    def _move(self, ids: list[Tensor], sums: list[Tensor], counts: list[Tensor]) -> None:
        unique, inverse = torch.cat(ids).unique(return_inverse=True)
        total, count = sums[0].new_zeros(len(unique), self.states.shape[1]), sums[0].new_zeros(len(unique))
        for rows, rank_sums, rank_counts in zip(inverse.split([*map(len, ids)]), sums, counts, strict=True):
            total.index_add_(0, rows, rank_sums)
            count.index_add_(0, rows, rank_counts)
        mean = total / count.unsqueeze(1)
        moved = self.momentum * self.states[unique] + (1 - self.momentum) * mean
        self.states[unique] = torch.where(self.seen[unique].unsqueeze(1), moved, mean)
        self.seen[unique] = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bank as it goes into a checkpoint, between two steps."""
        return {"states": self.states, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank from its `state_dict`."""
        self.states.copy_(state["states"])
        self.seen.copy_(state["seen"])
