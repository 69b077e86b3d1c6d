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

Gather = Callable[[Tensor], list[Tensor]]


class MemoryBank:
    """State (vocabulary, hidden) fp32 and which ids were seen, the same on every worker."""

    def __init__(self, vocabulary: int, hidden: int, momentum: float, device: torch.device | str = "cpu") -> None:
        self.momentum = momentum
        self.states = torch.zeros(vocabulary, hidden, device=device)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._seen_on_host = torch.zeros(vocabulary, dtype=torch.bool)
        self._added: list[tuple[Tensor, Tensor]] = []  # ids and states of this step

    @property
    def seen_ids(self) -> Tensor:
        """Return the ids that were seen, in order, on the host."""
        return self._seen_on_host.nonzero()[:, 0]

    def query(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return the queries q (batch, length, hidden) for ids (batch, length) and the student's states."""
        mixed = self.momentum * self.states[ids] + (1 - self.momentum) * states.float()
        return torch.where(self.seen[ids].unsqueeze(-1), mixed, states.float())

    @torch.no_grad()
    def accumulate(self, ids: Tensor, states: Tensor, valid: Tensor) -> None:
        """Add one micro-batch's valid states to the sums of this step; ids and mask (batch, length) are the host's."""
        places = valid.flatten().nonzero()[:, 0]
        self._added.append((ids.flatten()[places], states.flatten(0, 1)[sent(places, states.device)].float()))

    @torch.no_grad()
    def update(self, gather: Gather = lambda tensor: [tensor]) -> None:
        """Reduce the sums of all workers in rank order, move the bank, forget them: the end of the optimizer step.
        `gather` returns a tensor's value on every rank, in rank order; first dimensions may differ."""
        ids, states = (torch.cat(parts) for parts in zip(*self._added, strict=True))
        unique, sums, counts = _summed(ids, states, torch.ones(len(ids)))
        self._move(*_summed(*(torch.cat(gather(tensor)) for tensor in (unique, sums, counts))))
        self._added.clear()

    def _move(self, ids: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Move the bank towards the means of the states of each id; ids, distinct, and counts are the host's."""
        device = self.states.device
        moved, mean = sent(ids, device), sums / sent(counts, device).unsqueeze(1)
        known = self.momentum * self.states[moved] + (1 - self.momentum) * mean
        self.states[moved] = torch.where(self.seen[moved].unsqueeze(1), known, mean)
        self.seen[moved] = True
        self._seen_on_host[ids] = True

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
        self._seen_on_host.copy_(state["seen"])


def _summed(ids: Tensor, states: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct ids (host), and the sums of states (device) and counts (host) that belong to each."""
    unique, inverse = ids.unique(return_inverse=True)
    sums = states.new_zeros(len(unique), states.shape[1]).index_add_(0, sent(inverse, states.device), states)
    return unique, sums, counts.new_zeros(len(unique)).index_add_(0, inverse, counts)
