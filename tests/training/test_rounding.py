"""`distill.steps: 0`: the student is the teacher as it is rounded, scored and packed like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.models.build import load_model
from pipeline.package.package import load
from pipeline.quant.granularity import PER_CHANNEL
from pipeline.quant.grid import dequantize
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.spec import grid, levels_of
from tests.conftest import Ran

MATRICES = ("c_attn", "c_proj", "c_fc")


def rounded(weight: np.ndarray, row: bool) -> np.ndarray:
    """QuantGPT's ternary levels at gamma = 1, in float64."""
    mean = np.abs(weight).mean(1, keepdims=True) if row else np.abs(weight).mean()
    return mean * np.clip(np.rint(weight / mean), -1, 1)


@pytest.mark.parametrize(
    "quant",
    [
        {"bits": "2-2-8", "gamma_init": "one"},
        {"bits": "4-8-8", "granularity": "per_channel", "gamma_init": "mse"},
        {"bits": "2-2-8", "quantizer": "seq", "granularity": "per_channel", "gamma_init": "mse"},
        {"bits": "2-2-8", "quantizer": "twn"},
    ],
    ids=str,
)
def test_no_steps_give_the_teacher_rounded(
    tiny_config: Callable[..., Config], run_flow: Callable[..., Ran], cloned: Path, quant: dict[str, Any]
) -> None:
    ran = run_flow(tiny_config(cloned, quant=quant, distill={"steps": 0}), until="pack")
    record, spec = ran.record("distill"), Quant(**quant).spec()
    assert (record.steps, record.best_step) == (0, 0)
    teacher = load_model(ran.folder("finetune") / "model")
    latent = load_file(ran.folder("distill") / "weights.safetensors")
    shipped = dict(load(ran.package).named_parameters())
    quantized = 0
    for name, parameter in teacher.named_parameters():
        transposed = any(part in MATRICES for part in name.split(".")) and name.endswith("weight")
        weight = parameter.detach().T.contiguous() if transposed else parameter.detach()
        assert torch.equal(latent[name], weight)  # untouched by training
        if not transposed and not name.endswith("wte.weight"):
            assert torch.equal(shipped[name], weight)
            continue
        quantized += 1
        bits = spec.bits.weights if transposed else spec.bits.embedding
        granularity = spec.granularity if transposed else PER_CHANNEL
        codes, step = QUANTIZERS[spec.quantizer](weight, bits, granularity, spec).freeze(weight)
        directly = dequantize(codes, step, grid(levels_of(spec.quantizer), bits))
        assert torch.equal(shipped[name], directly)
        if quant == {"bits": "2-2-8", "gamma_init": "one"}:
            expected = rounded(weight.double().numpy(), granularity == PER_CHANNEL)
            np.testing.assert_allclose(shipped[name].detach().numpy(), expected, rtol=1e-5, atol=1e-8)
    assert quantized == 9
    evaluation = ran.record("evaluate")
    assert evaluation.student["perplexity"] > evaluation.teacher["perplexity"]
    assert ran.record("pack").size.packed_bytes < ran.record("pack").size.teacher_bytes / 2
