"""Logits a chunk at a time: a table of (tokens, vocabulary) never is in memory whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.models.hidden_states import head_input
from pipeline.tasks.batch import Batch

CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**28}  # of a chunk, by the kind of device: 0.25 and 1 GiB in fp32

Part = tuple[slice, slice]  # sequences and positions of a batch
Losses = Callable[[Tensor, Batch, Part], dict[str, Tensor]]  # sums in nats, of what the head multiplies


def parts_of(batch: Batch, vocabulary: int, limit: int | None = None) -> Iterator[Part]:
    """Yield the parts of a batch whose logits are at most `limit`: whole rows, as many in each where their number can
    be divided so, for every shape has to be compiled; positions of one sequence where a single one is too long."""
    sequences, length = batch.ids.shape
    limit = CHUNK_LOGITS[batch.ids.device.type] if limit is None else limit
    rows, positions = sequences // batch.group, max(1, limit // vocabulary)
    most = min(rows, positions // (length * batch.group))
    if most or batch.group > 1:
        most = max(1, most)
        each = next((n for n in range(most, most // 2, -1) if rows % n == 0), most) * batch.group
        yield from ((slice(first, first + each), slice(None)) for first in range(0, sequences, each))
        return
    for sequence in range(sequences):
        for first in range(0, length, positions):
            yield slice(sequence, sequence + 1), slice(first, first + positions)


def backward_by_parts(
    head: nn.Module, vocabulary: int, states: Tensor, batch: Batch, losses: Losses, shares: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Compute losses of logits and their gradients, part by part, each part's backward pass before the next one's
    logits; the head's own gradients are added where they belong.

    Args:
        states: the last states (sequences, length, hidden), with their graph.
        losses: gives those of a part, from the head's input there.
        shares: what each counts for in the sum that is minimised.

    Returns:
        The losses, the head's input, and the gradient with which it is to go on backwards.
    """
    prepared = head_input(head, states)
    gradient = torch.empty_like(prepared)
    sums: dict[str, Tensor] = {}
    for part in parts_of(batch, vocabulary):
        leaf = prepared[part].detach().requires_grad_()
        of_part = losses(leaf, batch.part(*part), part)
        torch.autograd.backward([*of_part.values()], [shares[name] for name in of_part])
        gradient[part] = cast(Tensor, leaf.grad)
        added = {name: loss.detach() for name, loss in of_part.items()}
        sums = {name: sums[name] + loss for name, loss in added.items()} if sums else added
    return sums, prepared, gradient
