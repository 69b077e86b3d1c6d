"""Rows of the next micro-batch, read while this one is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.store.shards import Rows, Stored

Read = tuple[Tensor, Tensor, Stored | None]  # what `Rows.get` returns


class ReadAhead:
    """Rows that a thread of its own reads ahead, one micro-batch at most; on machines with a GPU into memory from which
    it copies by itself."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self._rows, self._thread = rows, ThreadPoolExecutor(1, "read-ahead")
        self._pins = device.type == "cuda" and torch.accelerator.is_available()
        self._ahead: tuple[tuple[int, ...], Future[Read]] | None = None

    def get(self, row_ids: Sequence[int], then: Sequence[int] = ()) -> Read:
        """Return what `Rows.get` does, and begin to read the rows that are wanted next, in place of those before them:
        others may be asked for meanwhile."""
        wanted, ahead = tuple(row_ids), self._ahead
        if ahead is not None and ahead[0] == wanted:
            self._ahead = None  # before what it may raise
            rows = ahead[1].result()
        else:
            rows = self._read(wanted)
        if len(then):
            self._ahead = tuple(then), self._thread.submit(self._read, tuple(then))
        return rows

    def lengths(self, row_ids: Sequence[int]) -> Tensor:
        """Return what `Rows.lengths` does."""
        return self._rows.lengths(row_ids)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, row_ids: tuple[int, ...]) -> Read:
        return self._rows.get(row_ids, pin=self._pins)
