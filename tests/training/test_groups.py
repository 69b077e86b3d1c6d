"""A student with one scale for each group of a row: trained, interrupted, frozen and restored as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.config.training import Distill
from pipeline.models.build import load_model, read_config
from pipeline.models.family import family_named
from pipeline.models.hidden_states import spare_operations
from pipeline.models.student import (
    freeze_student,
    load_frozen,
    load_parameters,
    make_student,
    restore_frozen,
    save_frozen,
)
from pipeline.quant.modules import quantizers
from pipeline.store.records import Student, Tokens
from pipeline.store.shards import Rows
from tests.conftest import Ran
from tests.training.cases import VOCABULARY, WIDTH, Case, steps_of
from tests.training.test_trainer import DISTILL, weights_after

GPT2 = family_named("gpt2")
IDS = torch.randint(0, VOCABULARY, (3, WIDTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("groups"))


def grouped(quantizer: str, bits: str = "2-2-8") -> Quant:
    return Quant(bits=bits, quantizer=quantizer, granularity={"per_group": 32})


@pytest.mark.parametrize(("quantizer", "bits"), [("quantgpt", "2-2-8"), ("laq", "4-8-8"), ("seq", "2-4-8")])
def test_a_student_of_groups_trains_freezes_and_comes_back(
    case: Case, quantizer: str, bits: str, tmp_path: Path
) -> None:
    quant = grouped(quantizer, bits)
    loop = case.loop(case.run(Distill(**DISTILL), f"whole-{quantizer}"), quant)
    started = {name: q.freeze(weight)[1] for name, weight, q in quantizers(loop.model.model)}
    losses = steps_of(loop, 50)["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])
    student = loop.model.model.eval()
    frozen = freeze_student(student, quant, GPT2)
    for name, codes in frozen.codes.items():
        rows, columns = codes.shape
        groups = 1 if name == "transformer.wte" else columns // 32  # words have one scale each
        assert tuple(frozen.scales[name].shape) == (rows, groups)
        assert (frozen.scales[name] != started[name]).any()
    assert {scale.shape[1] for scale in frozen.scales.values()} == {1, 4}
    save_frozen(frozen, tmp_path / "frozen.safetensors")
    again = load_frozen(tmp_path / "frozen.safetensors")
    assert again.digest() == frozen.digest()
    restored = restore_frozen(read_config(case.teacher), quant.spec(), GPT2, again)
    spare_operations(restored)  # GELU to the bit as in training
    with torch.no_grad():
        assert torch.equal(restored(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("quantizer", ["lsq", "laq"])
def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(case: Case, quantizer: str) -> None:
    recipe, quant = Distill(**{**DISTILL, "steps": 14, "eval_every": 14}), grouped(quantizer)
    undisturbed = weights_after(case, case.run(recipe, f"u-{quantizer}", checkpoint_minutes=4), quant)
    disturbed = weights_after(case, case.run(recipe, f"d-{quantizer}", checkpoint_minutes=4), quant, (6, 11))
    assert undisturbed.keys() == disturbed.keys()
    assert all(torch.equal(disturbed[key], undisturbed[key]) for key in undisturbed)


def test_a_run_ends_in_a_package_of_the_trained_student(
    tiny_config: Callable[..., Config], run_flow: Callable[..., Ran], cloned: Path
) -> None:
    config = tiny_config(cloned, quant={"granularity": {"per_group": 32}, "quantizer": "lsq"}, distill={"steps": 5})
    ran = run_flow(config, until="pack")
    record = ran.record("distill")
    assert record.recipe["quant"]["granularity"] == {"per_group": 32}
    frozen = load_frozen(ran.folder("distill") / Student.FROZEN)
    assert frozen.digest() == record.digest == ran.record("evaluate").digest
    student = load_model(ran.folder("finetune") / "model")
    make_student(student, config.quant.spec(), GPT2)
    load_parameters(student, load_file(ran.folder("distill") / Student.WEIGHTS))
    assert freeze_student(student, config.quant, GPT2).digest() == record.digest
    ids, _, _ = Rows(ran.plan.step(Tokens).dir, ran.record("tokenize").splits["test"].shards).get(range(4))
    with torch.no_grad():
        assert torch.equal(pipeline.load(ran.package)(ids).logits, student.eval()(ids).logits)
