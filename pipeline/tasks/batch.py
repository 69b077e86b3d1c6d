"""Rows as a model sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.distill.losses import valid_tokens
from pipeline.distill.transfer import sent


@dataclass(frozen=True)
class Batch:
    """Rows as the model sees them. A row may hold several sequences side by side, the reference first.

    `targets` follows `ids` by one token and may lack the last position. `supervised` says where a target is to be
    learned and scored, `distilled` where the teacher's distribution is.
    """

    ids: Tensor  # (sequences, length): what the decoder reads
    lengths: Tensor  # (sequences,): those that are not padding
    targets: Tensor  # (sequences, length or length - 1)
    supervised: Tensor  # bool, as targets
    distilled: Tensor  # bool (sequences, length)
    source_ids: Tensor | None = None  # (sequences, source length): what the encoder reads
    source_mask: Tensor | None = None  # int64, 1 where the source is not padding
    positions: Tensor | None = None  # int64 (sequences, length): of each token in its document, where those are packed
    group: int = 1  # sequences of a row
    before: Batch | None = None  # the same as it was on the host

    @property
    def on_host(self) -> Batch:
        """Return the batch on the host, whose values can be read without waiting for a device."""
        return self.before or self

    @property
    def valid(self) -> Tensor:
        """Return where a token is not padding, bool (sequences, length)."""
        return valid_tokens(self.lengths, self.ids.shape[1])

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Return what the model is called with: ids, and where there are others, all four, of which some are None."""
        given = self.ids, self.source_ids, self.source_mask, self.positions
        return given[:1] if given[1:] == (None, None, None) else given

    def first_document(self, row: int) -> int:
        """Return how many tokens the first document of a row has, of those that it packs; all that are not padding."""
        begun = () if self.positions is None else (self.positions[row, 1:] == 0).nonzero().flatten() + 1
        return min(int(length) for length in (self.lengths[row], *begun))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; a GPU goes on while it is copied."""
        return self._with(lambda tensor: sent(tensor, device), self.group, self.on_host)

    def references(self) -> Batch:
        """Return the first sequence of each row alone."""
        return self._with(lambda tensor: tensor[:: self.group], 1, None)

    def part(self, sequences: slice, positions: slice) -> Batch:
        """Return some sequences, of whole rows, at some positions: what losses need of them, and no more."""
        return self._with(
            lambda tensor: tensor[sequences] if tensor.ndim == 1 else tensor[sequences, positions], self.group, None
        )

    def _with(self, change: Callable[[Tensor], Tensor], group: int, before: Batch | None) -> Batch:
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed, group=group, before=before)
