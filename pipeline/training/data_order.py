"""Order of the data: which rows make up each batch, a pure function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.distill.random import draw


class DataOrder:
    """The rows of each global batch: a function of (seed, epoch, batch) and of nothing else.

    Each epoch permutes the shards and then the rows within a window of shards, so that a reader needs only `window`
    shards at a time, however large the corpus. The epochs follow each other without a gap: a batch may take its last
    rows from the next epoch, and no row is dropped.
    """

    def __init__(self, shard_rows: list[int], seed: int, window: int = 16) -> None:
        self.first_row = torch.tensor([0, *shard_rows]).cumsum(0)
        self.rows = int(self.first_row[-1])
        self.seed, self.window = seed, window
        self._epochs: dict[int, Tensor] = {}

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Return the global row ids of batch `step`, in order, int64."""
        parts, wanted = list[Tensor](), batch_size
        while wanted:
            epoch, begins = divmod((step + 1) * batch_size - wanted, self.rows)
            parts.append(self.epoch(epoch)[begins : begins + wanted])
            wanted -= len(parts[-1])
        return torch.cat(parts)

    def epoch(self, epoch: int) -> Tensor:
        """Return all row ids in the order of one epoch."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            generator = draw("order", self.seed, epoch)
            windows = torch.randperm(len(self.first_row) - 1, generator=generator).split(self.window)
            self._epochs[epoch] = torch.cat([self._mixed(window, generator) for window in windows])
        return self._epochs[epoch]

    def _mixed(self, shards: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.cat([torch.arange(int(self.first_row[s]), int(self.first_row[s + 1])) for s in shards])
        return rows[torch.randperm(len(rows), generator=generator)]


def rank_rows(rows: Tensor, rank: int, world: int) -> Tensor:
    """Return the contiguous part of a global batch that one worker takes; sizes differ by one at most."""
    return rows.tensor_split(world)[rank]
