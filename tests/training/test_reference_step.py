"""The first step of a preset against the same computed plainly: by transformers' own model and its whole table of
logits, each weight by its own quantizer at each use, inputs and losses by their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.distill.memory_bank import MemoryBank
from pipeline.distill.negatives import draw_offsets
from pipeline.models.build import load_model, set_dropout
from pipeline.models.family import family_named
from pipeline.models.student import make_student
from pipeline.tasks.chunks import CHUNK_LOGITS
from pipeline.training.data_order import DataOrder
from tests.training.cases import HIDDEN, VOCABULARY, WIDTH, Case, gradients

ROWS, MICRO = 10, 4
SHORT = 39  # the row that has padding


def plain_activation(x: Tensor, bits: int, symmetric: bool, over: str, from_zero: bool = False) -> Tensor:
    """What compilers are given of an input, with a straight-through gradient."""
    assert (over, from_zero) == ("token", False)
    values = x.detach()
    if symmetric:
        n, most = 2 ** (bits - 1) - 1, values.abs().amax(-1, keepdim=True)
        quantized = (values * n / most).round() / n * most
    else:
        low = values.amin(-1, keepdim=True)
        scale = (values.amax(-1, keepdim=True) - low) / (2**bits - 1)
        quantized = low + ((values - low) / scale).round() * scale
    return quantized + (x - values)


def contrast(
    recipe: Distill, rows: list[int], ids: Tensor, lengths: Tensor, teacher: Tensor, student: Tensor, bank: MemoryBank
) -> Tensor:
    """By its definition, token by token, of negatives from the teacher; the sum in nats."""
    total = torch.zeros((), dtype=torch.float64)
    for place, row in enumerate(rows):
        length = int(lengths[place])
        offsets = draw_offsets(recipe.seed, 0, row, length, recipe.negatives)
        for i in range(length):
            word = int(ids[place, i])
            query, known = student[place, i].double(), bank.states[word].double()
            if bank.seen[word]:
                query = recipe.momentum * known + (1 - recipe.momentum) * query
            others = teacher[place, torch.cat([torch.tensor([i]), (i + offsets) % length])].double()
            cosines = others @ query / (others.norm(dim=1) * query.norm())
            total = total - (cosines / recipe.temperature).log_softmax(0)[0]
    return total


def plain_step(case: Case, recipe: Distill, quant: Quant, rows: list[int], read: Any, bank: MemoryBank) -> Any:
    """The loss and the gradients of the first step."""
    ids, lengths, _ = read(rows)
    valid = torch.arange(WIDTH) < lengths.unsqueeze(1)
    teacher, student = load_model(case.teacher).eval(), load_model(case.teacher).train()
    set_dropout(student, 0.0)
    make_student(student, quant.spec(), family_named(case.family))
    asked: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": valid.long(),
        "use_cache": False,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        taught = teacher(**asked)
    learned = student(**asked)
    nats = -(taught.logits.double().softmax(-1) * learned.logits.double().log_softmax(-1)).sum(-1)
    loss = (nats * valid).sum() / valid.sum()
    if recipe.contrast_weight:
        states = taught.hidden_states[-1], learned.hidden_states[-1]
        loss = loss + recipe.contrast_weight * contrast(recipe, rows, ids, lengths, *states, bank) / valid.sum()
    loss.backward()
    return loss.item(), {f"model.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_step_is_that_of_the_plain_formulas(
    preset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 2 * WIDTH * VOCABULARY)  # so that a micro-batch has two parts
    case, sections = Case.make(tmp_path), PRESETS[preset]
    orders = (DataOrder([shard.rows for shard in case.train], seed).batch(0, ROWS) for seed in range(99))
    seed, rows = next((seed, rows.tolist()) for seed, rows in enumerate(orders) if SHORT in rows)
    recipe = Distill(**{**sections["distill"], "steps": 9, "batch_size": ROWS, "eval_rows": 4, "seed": seed})
    quant, run = Quant(**sections["quant"]), case.run(recipe, preset, case.cache("float32"), micro_batch=MICRO)
    loop = case.loop(run, quant)
    assert loop.distillation is not None
    bank, draw = loop.distillation.bank, torch.Generator().manual_seed(0)
    bank.load_state_dict(
        {"states": torch.randn(VOCABULARY, HIDDEN, generator=draw), "seen": torch.arange(VOCABULARY) % 2 == 0}
    )
    loss, given = gradients(loop)
    monkeypatch.setattr("pipeline.quant.modules.fake_quantize_activation", plain_activation)
    expected_loss, expected = plain_step(case, recipe, quant, rows, loop.rows.get, bank)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert given.keys() == expected.keys()
    off = torch.cat([(given[name] - gradient).flatten() for name, gradient in expected.items()])
    assert off.norm() < 1e-4 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
