"""All weights of a model on their grids, once a training step and in few operations: matrices whose quantizers differ
in their parameters alone are quantized as one stack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.quant.modules import QuantizedWeight, faded_in
from pipeline.quant.quantizers import WeightQuantizer

# Weights of a matrix that is worth operations of its own: its copy in a stack would cost more than it saves.
LARGE = {"cpu": 2**20, "cuda": 2**23}

Quantize = Callable[[nn.Module, Tensor, dict[str, Tensor], float | Tensor], Tensor]


def on_grid(quantizer: nn.Module, folded: Tensor, parameters: dict[str, Tensor], blend: float | Tensor) -> Tensor:
    """Return folded weights as a training pass uses them, by a quantizer that is lent its parameters."""
    return faded_in(folded, functional_call(quantizer, parameters, (folded,)), blend)


@dataclass(frozen=True)
class Stack:
    """Modules whose folded weights have rows of one length, and whose quantizers do the same to each row."""

    modules: list[QuantizedWeight]

    @property
    def quantizers(self) -> list[WeightQuantizer]:
        """Return the quantizers, one a module."""
        return [cast(WeightQuantizer, module.quantizer) for module in self.modules]

    def quantized(self, quantize: Quantize) -> Tensor:
        """Return the weights of all modules on their grids, folded, (rows of all, columns)."""
        first, pairs = self.quantizers[0], zip(self.quantizers, self.modules, strict=True)
        folded = [quantizer.granularity.fold(module.weight) for quantizer, module in pairs]
        parameters = {
            f"quantizer.{name}": _joined([quantizer.get_parameter(name) for quantizer in self.quantizers])
            for name, _ in first.named_parameters()
        }
        # As a tensor it is no constant of what is compiled.
        blend = first.blend if first.blend == 1.0 else torch.full((), first.blend, device=folded[0].device)
        return quantize(_OfFolded(first), _joined(folded), parameters, blend)

    def hold(self, levels: Tensor) -> list[Tensor]:
        """Have the modules use these levels; return what each uses, a leaf on which its gradients gather."""
        parts = levels.detach().split([module.weight.numel() // levels.shape[1] for module in self.modules])
        for module, part in zip(self.modules, parts, strict=True):
            module.held = part.view(module.weight.shape).requires_grad_(levels.requires_grad)
        return [cast(Tensor, module.held) for module in self.modules]


class _OfFolded(nn.Module):
    """A quantizer that is called with folded weights."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, folded: Tensor) -> Tensor:
        return self.quantizer.fake_quantize(folded)


class Stacks:
    """The stacks of a model."""

    def __init__(self, model: nn.Module, quantize: Quantize = on_grid) -> None:
        groups: dict[Hashable, list[QuantizedWeight]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantizedWeight) and module.quantizer is not None:
                large = module.weight.numel() > LARGE[module.weight.device.type]
                groups.setdefault(name if large else _does(module.quantizer, module.weight), []).append(module)
        self._stacks, self._quantize = [*map(Stack, groups.values())], quantize

    @contextmanager
    def quantized_once(self) -> Iterator[None]:
        """Quantize every weight once for all passes inside, however many micro-batches and uses there are.

        Gradients gather on the quantized weights. When all is done they go through the quantizers, once, to latent
        weights and scales; nothing goes anywhere if what is inside fails.
        """
        levels = [stack.quantized(self._quantize) for stack in self._stacks]
        held = [stack.hold(of_stack) for stack, of_stack in zip(self._stacks, levels, strict=True)]
        try:
            yield
        finally:
            for stack in self._stacks:
                for module in stack.modules:
                    module.held = module.codes = None
        while levels:  # one after the other, each let go of before the next
            of_stack, leaves = levels.pop(), held.pop()
            gradient = _gradient(leaves, of_stack)
            leaves.clear()
            if gradient is not None:
                of_stack.backward(gradient)


def _does(quantizer: WeightQuantizer, weight: Tensor) -> Hashable:
    """Return what two quantizers have in common that do the same to each row of their folded weights."""
    settings = {name: value for name, value in vars(quantizer).items() if not name.startswith("_")}
    columns = quantizer.granularity.fold(weight).shape[1]
    return type(quantizer), columns, weight.requires_grad, tuple(sorted((k, repr(v)) for k, v in settings.items()))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _gradient(leaves: list[Tensor], levels: Tensor) -> Tensor | None:
    """Return the gradient of the levels of a stack, folded as they are; None if no pass has used them."""
    if all(leaf.grad is None for leaf in leaves):
        return None
    return _joined([_gradient_of(leaf).reshape(-1, levels.shape[1]) for leaf in leaves])


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
