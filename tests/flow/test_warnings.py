"""What a plan says of the machine it is made on: a GPU that is left alone or missing, bf16 that is emulated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config.run import Config
from pipeline.flow.plan import plan_run
from pipeline.models.device import emulates_bf16
from tests.conftest import Ran

GPU_UNUSED, GPU_MISSING = "gpus_per_worker: 1 to use it", "Set resources.gpus_per_worker: 0"
EMULATED = "{}.precision is bf16.* Set {}.precision: fp32"
AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
BF16 = {"finetune": {"precision": "bf16"}, "distill": {"precision": "bf16"}}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], None]:
    """`machine(gpu, bf16)`: what torch tells of this machine from here on."""

    def be(gpu: bool, bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**AVX2, "amx_bf16": bf16})

    return be


@pytest.mark.parametrize(
    ("gpu", "bf16", "fields", "expected"),
    [
        (False, False, {}, []),
        (True, True, {}, [GPU_UNUSED]),
        (True, True, {"resources": {"gpus_per_worker": 1}}, []),
        (False, True, {"resources": {"gpus_per_worker": 0.5}}, [GPU_MISSING]),
        (False, True, {"resources": {"gpus_per_worker": 1, "workers": 1}}, []),  # which Ray refuses
        (False, True, BF16, []),
        (False, False, BF16, [EMULATED.format("finetune", "finetune"), EMULATED.format("distill", "distill")]),
        (False, False, {"distill": {"precision": "bf16"}}, [EMULATED.format("distill", "distill")]),
        (True, False, BF16 | {"resources": {"gpus_per_worker": 1}}, []),
        (True, False, BF16 | {"resources": {"ray_address": "10.0.0.1:6379"}}, []),
    ],
)
def test_a_plan_warns_of_what_this_machine_does_otherwise(
    tiny_config: Callable[..., Config],
    tmp_path: Any,
    machine: Callable[[bool, bool], None],
    gpu: bool,
    bf16: bool,
    fields: dict[str, Any],
    expected: list[str],
) -> None:
    machine(gpu, bf16)
    told = plan_run(tiny_config(tmp_path, **fields)).warnings
    assert len(told) == len(expected)
    for text, pattern in zip(told, expected, strict=True):
        assert re.search(pattern, text)


def test_what_is_done_is_not_warned_of(finished: Ran, machine: Callable[[bool, bool], None]) -> None:
    machine(True, False)
    config = finished.plan.config
    assert plan_run(config).warnings == []
    other = config.model_copy(update={"pack": config.pack.model_copy(update={"encoding": "base3"})})
    packing = plan_run(other)
    assert packing.left[0].name == "pack"
    assert packing.warnings == []


@pytest.mark.parametrize(
    ("capabilities", "emulates"),
    [
        (AVX2, True),
        ({**AVX2, "avx512_bf16": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": False, "sve_bf16": False}, True),
    ],
)
def test_units_for_bf16_are_those_that_torch_reports(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], emulates: bool
) -> None:
    assert "avx2" in torch.cpu.get_capabilities() or "neon" in torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert emulates_bf16() == emulates
