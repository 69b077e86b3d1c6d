"""`distill.products: int8`: the same student but for float order, trained and packed as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.config.training import Distill
from tests.conftest import Ran
from tests.training.cases import Case, gradients
from tests.training.test_trainer import DISTILL, relative


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantizer", ["quantgpt", "seq"])
def test_a_first_step_is_that_of_floating_point_but_for_float_order(
    tmp_path: Path, quantizer: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, quant, real = Case.make(tmp_path), Quant(bits="2-2-8", quantizer=quantizer), torch._int_mm
    taken, made = [], []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: made.append(b.data_ptr()) or real(a, b))
    for products in ("float", "int8"):
        recipe = Distill.model_validate({**DISTILL, "products": products})
        loop = case.loop(case.run(recipe, products, micro_batch=6, activation_checkpointing=checkpointing), quant)
        made.clear()
        taken.append(gradients(loop))
        assert bool(made) == (products == "int8")
    (loss, grads), (of_integers, their_grads) = taken
    assert of_integers == pytest.approx(loss, rel=1e-5)
    assert relative(their_grads, grads) < 1e-3
    assert len(set(made[-16:])) == 8  # the layers' codes, made once for both micro-batches


def test_a_run_ends_in_a_package(
    tiny_config: Callable[..., Config], run_flow: Callable[..., Ran], cloned: Path
) -> None:
    ran = run_flow(tiny_config(cloned, distill={"steps": 5, "products": "int8"}), until="pack")
    record = ran.record("distill")
    assert record.recipe["distill"]["products"] == "int8"
    assert pipeline.load(ran.package)(torch.arange(8)[None]).logits.isfinite().all()
