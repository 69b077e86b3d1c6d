"""What torch.compile makes of a training step: kernels that do in one pass what are many operations otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

# Graphs of one function: a layer's are those of each kind of layer, of training and scoring, and of ragged batches.
GRAPHS = 64

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Return a function that is compiled for each shape that it is called with."""
    torch._dynamo.config.recompile_limit = GRAPHS
    return cast(F, torch.compile(function, dynamic=False))


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of a model in place, one by one: layers that are alike share what is compiled, so that it
    takes seconds where a whole model takes minutes."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.recompile_limit = GRAPHS
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)
