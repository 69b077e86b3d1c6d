"""What a training step costs, in what can be counted on any machine: operations."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.models.build import load_model, set_dropout
from pipeline.training import trainer as training
from tests.operations import Launches
from tests.training.cases import ARCHITECTURE, WIDTH, Case

LAYERS = 12
# Over transformers' own, of a batch in one pass and in four. Inputs alone are 0.39 of it in one pass: where nothing is
# compiled each is quantized in four operations, those after a GELU in seven.
MOST = {"paper": (1.35, 1.165), "best": (1.29, 1.1), "smallest": (1.275, 1.095)}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURE, "n_layer", LAYERS)
        return Case.make(tmp_path_factory.mktemp("deep"))


def launches_of(step: Any) -> int:
    step(0)
    with Launches() as launched:
        step(1)
    return launched.count


def transformers_step(case: Case, parts: int) -> int:
    model = load_model(case.teacher).train()
    set_dropout(model, 0.0)  # as the student's is
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(4, WIDTH, dtype=torch.int64)

    def step(number: int) -> None:
        optimizer.zero_grad()
        for part in ids.chunk(parts):
            (model(input_ids=part, labels=part, use_cache=False).loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return launches_of(step)


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_launches_little_more_than_transformers(deep: Case, preset: Any, micro: int) -> None:
    sections = PRESETS[preset]
    fields: dict[str, Any] = {**sections["distill"], "steps": 9, "batch_size": 4, "eval_rows": 4}
    run = deep.run(Distill(**fields), f"{preset}-{micro}", deep.cache("float16"), micro_batch=micro)
    ours = launches_of(deep.loop(run, Quant(**sections["quant"])).train_step)
    assert ours <= MOST[preset][micro == 1] * transformers_step(deep, 4 // micro)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_compiled_step_is_the_step(deep: Case, preset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced; the kernels that are made of it are torch's own."""
    torch._dynamo.reset()  # what another test's stand-in for a device kept it from compiling, it would skip for ever
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    sections, given = PRESETS[preset], []
    fields: dict[str, Any] = {**sections["distill"], "steps": 9, "batch_size": 4, "eval_rows": 4, "fade_in": 0.5}
    cache = deep.cache("float16")
    for compiles in (False, True):
        run = deep.run(Distill(**fields), f"compiled-{compiles}", cache, micro_batch=4, compile=compiles)
        loop: training.Trainer = deep.loop(run, Quant(**sections["quant"]))
        loop.train_step(0)
        loss = float(loop.backward(1)["loss"])
        given.append((loss, {name: p.grad for name, p in loop.model.named_parameters() if p.grad is not None}))
    (plain, expected), (compiled, gradients) = given
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert gradients.keys() == expected.keys()
    off = torch.cat([(gradients[name] - gradient).flatten() for name, gradient in expected.items()])
    assert off.norm() < 1e-4 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
