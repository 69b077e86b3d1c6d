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

from pipeline.distill.transfer import sent

Gather = Callable[..., list[list[Tensor]]]


class MemoryBank:
    """State (vocabulary, hidden) fp32, on the device, and which ids were seen, on the host; the same on every
    worker."""

    def __init__(self, vocabulary: int, hidden: int, momentum: float, device: torch.device | str = "cpu") -> None:
        self.momentum = momentum
        self.states = torch.zeros(vocabulary, hidden, device=device)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool)
        self._weights = torch.zeros(vocabulary, device=device)  # of the bank in a mixture: 0 until an id was seen
        self._added: list[tuple[Tensor, Tensor]] = []  # ids and states of this step

    @property
    def seen_ids(self) -> Tensor:
        """Return the ids that were seen, in order, on the host."""
        return self.seen.nonzero()[:, 0]

    def query(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return the queries q (batch, length, hidden) for ids (batch, length) and the student's states."""
        return self._mixed(ids, states.float())

    @torch.no_grad()
    def accumulate(self, ids: Tensor, states: Tensor, valid: Tensor) -> None:
        """Add one micro-batch's valid states to the sums of this step; ids and mask (batch, length) are the host's."""
        places = valid.flatten().nonzero()[:, 0]
        ids, states = ids.flatten(), states.detach().flatten(0, 1)
        if len(places) < len(ids):
            ids, states = ids[places], states[sent(places, states.device)]
        self._added.append((ids, states.float()))

    @torch.no_grad()
    def update(self, gather: Gather = lambda *tensors: [[tensor] for tensor in tensors]) -> None:
        """Reduce the sums of all workers in rank order, move the bank, forget them: the end of the optimizer step.
        `gather` returns of each of several tensors, which have one length, its value on every rank, in rank order;
        ranks may differ in length."""
        ids, states = self._added[0] if len(self._added) == 1 else map(torch.cat, zip(*self._added, strict=True))
        unique, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        sums = _summed(states, inverse, len(unique))
        gathered = gather(unique, sums, counts)
        if len(gathered[0]) > 1:
            ids, sums, counts = map(torch.cat, gathered)
            unique, inverse = ids.unique(return_inverse=True)
            sums, counts = (_summed(tensor, inverse, len(unique)) for tensor in (sums, counts))
        self._move(unique, sums, counts)
        self._added.clear()

    def _move(self, ids: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Move the bank towards the means of the states of each id; ids, distinct, and counts are the host's."""
        device = self.states.device
        moved, mean = sent(ids, device), sums / sent(counts, device).unsqueeze(1)
        self.states[moved] = self._mixed(moved, mean)
        self._weights[moved] = self.momentum
        self.seen[ids] = True

    def _mixed(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return the bank's states of ids moved towards others, which stay as they are where an id was not seen."""
        return torch.lerp(states, self.states[ids], self._weights[ids].unsqueeze(-1))

    def forget(self) -> None:
        """Forget the sums of a step that is begun again."""
        self._added.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bank as it goes into a checkpoint, between two steps."""
        return {"states": self.states, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank from its `state_dict`."""
        self.states.copy_(state["states"])
        self.seen.copy_(state["seen"])
        self._weights.copy_(self.momentum * self.seen)


def _summed(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the sums of rows that belong to the same of so many places; which place each belongs to is the host's."""
    return rows.new_zeros(count, *rows.shape[1:]).index_add_(0, sent(places, rows.device), rows)
