"""What quantizing costs a linear layer in training, beside torchao's quantization-aware training of the same layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from jobs.bench.training.measures import seconds_a_step
from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.models.device import CPU
from pipeline.quant.modules import QuantTarget, prepare
from pipeline.quant.stacks import Stacks

NOT_RUN = "not run: torchao is not installed"
Held = Callable[[], AbstractContextManager[None]]  # in which a pass runs


def fake_quantization(width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time a forward and a backward pass of the linear layers of a GPT-2's block on the CPU: as they are, with weights
    of 2 bits and inputs of 8 by the preset `best`, and with torchao's fake quantization of the same widths; return
    milliseconds, and our own cost over torchao's."""
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, columns) for columns, _ in shapes]
    layers: dict[str, tuple[nn.ModuleList, Held]] = {"plain": (_linears(shapes), nullcontext)}
    quantized = _linears(shapes)
    spec = Quant.model_validate({**PRESETS["best"]["quant"], "bits": "2-2-8"}).spec()
    prepare(quantized, [QuantTarget(str(place), "linear", False) for place in range(len(shapes))], spec)
    layers["ours"] = quantized.train(), Stacks(quantized).quantized_once
    if importlib.util.find_spec("torchao") is not None:
        layers["torchao"] = _of_torchao(shapes), nullcontext
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds + 1):
        for name, (modules, held) in layers.items():
            times[name].append(seconds_a_step(partial(_pass, modules, inputs, held), 0, 1, CPU))
            if turn == 0:
                times[name].clear()  # which warmed up
    given: dict[str, Any] = {f"{name}_ms": 1e3 * median(seconds) for name, seconds in times.items()}
    if "torchao_ms" not in given:
        return given | {"torchao": NOT_RUN}
    plain = given["plain_ms"]
    return given | {"of_torchao": (given["ours_ms"] - plain) / (given["torchao_ms"] - plain)}


def _pass(modules: nn.ModuleList, inputs: list[torch.Tensor], held: Held, step: int) -> None:
    modules.zero_grad(set_to_none=True)
    with held():
        for module, states in zip(modules, inputs, strict=True):
            module(states.detach().requires_grad_()).sum().backward()


def _linears(shapes: tuple[tuple[int, int], ...]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(columns, rows) for columns, rows in shapes)


def _of_torchao(shapes: tuple[tuple[int, int], ...]) -> nn.ModuleList:
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int2, "per_channel", is_symmetric=True)  # type: ignore[attr-defined]
    return nn.ModuleList(
        FakeQuantizedLinear(columns, rows, bias=True, activation_config=activations, weight_config=weights)
        for columns, rows in shapes
    )
