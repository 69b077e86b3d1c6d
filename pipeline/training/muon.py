"""Muon (Jordan et al. 2024) over stacks of matrices of one shape, orthogonalised in what the device is fast at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.models.sharded import is_part, like, own, part_like, whole

UPDATE_RMS = 0.2  # what torch's "match_rms_adamw" makes the root mean square of an update, at a rate of 1
# Numbers that are orthogonalised at once: 256 MiB on a GPU, 512 MiB on a CPU. A step of Newton and Schulz holds as much
# again for what it makes of them, and at most as much for each of two products of theirs. Beside it a GPU holds all
# matrices in bf16 while a step lasts.
MOST_STACKED = 2**27


class StackedMuon(torch.optim.Muon):
    """Torch's Muon with `nesterov` and `match_rms_adamw`, its settings and its state, which moves all its matrices in a
    few operations: those of one shape, or of its transpose, are orthogonalised as one stack. Where workers share
    matrices out each keeps its parts of the averages, and all orthogonalise what is gathered of a stack at a time.

    On GPUs in bf16, as torch does; on CPUs in fp32: one that has no units for bf16 emulates it, some 16 times as
    long, and what is emulated differs from what is not.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        grouped = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grouped:
            return
        moved, settings = [p for p, _ in grouped], grouped[0][1]  # groups differ in their rates alone
        for parameter in moved:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        averages = [own(self.state[p]["momentum_buffer"]) for p in moved]
        grads = [own(p.grad) for p in moved]
        torch._foreach_lerp_(averages, grads, 1 - settings["momentum"])
        updates = list(torch._foreach_lerp(grads, averages, settings["momentum"]))
        newton_schulz = settings["ns_coefficients"], settings["ns_steps"], settings["eps"]
        if not any(map(is_part, moved)):
            _orthogonalise(updates, *newton_schulz)
        else:
            for numbers in _stacks(moved):  # no more than one of them is gathered at a time
                gathered = [whole(like(updates[i], moved[i])) for i in numbers]
                _orthogonalise(gathered, *newton_schulz)
                for i, update in zip(numbers, gathered, strict=True):
                    updates[i] = own(part_like(update, moved[i]))
        held = [own(p) for p in moved]
        if settings["weight_decay"]:
            torch._foreach_mul_(held, [1 - group["lr"] * group["weight_decay"] for _, group in grouped])
        torch._foreach_mul_(updates, [-group["lr"] * UPDATE_RMS * max(p.shape) ** 0.5 for p, group in grouped])
        torch._foreach_add_(held, updates)


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of the matrices that make a stack: of one shape or its transpose, wide ones first."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape))].append(number)
    for (rows, columns), numbers in alike.items():
        ordered = sorted(numbers, key=lambda number: _is_tall(matrices[number]))
        most = max(1, MOST_STACKED // (rows * columns))
        yield from (ordered[first : first + most] for first in range(0, len(ordered), most))


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _orthogonalise(matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float) -> None:
    """Put in place of each matrix what `orthogonalised` makes of it over its norm, in its own dtype.

    All are cast by one operation, and so that each is copied as it lies in memory: with others among them, such as
    transposed ones, a GPU would be launched for each.
    """
    torch._foreach_div_(matrices, torch._foreach_clamp_min(torch._foreach_norm(matrices), eps))
    updates = matrices
    if matrices[0].device.type != "cpu":
        updates = [torch.empty_like(matrix, dtype=torch.bfloat16) for matrix in matrices]
        torch._foreach_copy_(updates, matrices)
    for numbers in _stacks(matrices):
        stack = torch.stack([updates[i].mT if _is_tall(updates[i]) else updates[i] for i in numbers])
        update, wide = orthogonalised(stack, coefficients, steps), sum(not _is_tall(updates[i]) for i in numbers)
        together = *update[:wide].unbind(), *update[wide:].mT.contiguous().unbind()
        for i, made in zip(numbers, together, strict=True):
            updates[i] = made
    if updates is not matrices:
        torch._foreach_copy_(matrices, updates)


def orthogonalised(stack: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return about U V^T of each matrix U S V^T of a stack (matrices, rows, at least as many columns) whose singular
    values are at most 1, in its own dtype: each step of Newton and Schulz turns X into (a + b G + c G^2) X with
    G = X X^T, and singular values end near 1."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = stack @ stack.mT
        stack = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), stack, beta=a)
    return stack
