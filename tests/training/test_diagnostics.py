"""The two diagnoses against direct computation, and what a finished or interrupted run has of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.distill.losses import valid_tokens
from pipeline.models.build import load_model
from pipeline.models.family import family_named
from pipeline.models.student import load_parameters, make_student
from pipeline.quant.modules import InputQuantizer, QuantizedLinear
from pipeline.training.diagnostics import Watch, token_cosine, weight_histograms
from tests.conftest import Ran
from tests.quant.cases import make
from tests.training.cases import Case, run_until

# A quantizer with its grid's codes low..high and shift at 2 bits, and at 4.
GRIDS = {"quantgpt": (-1, 1, 0.0), "twn": (-1, 1, 0.0), "lsq": (-2, 1, 0.0), "seq": (-2, 1, 0.5)}
GRIDS_4 = {"quantgpt": (-7, 7, 0.0), "lsq": (-8, 7, 0.0), "seq": (-8, 7, 0.5)}
CASES = [(name, 2, grid) for name, grid in GRIDS.items()] + [(name, 4, grid) for name, grid in GRIDS_4.items()]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("diagnostics"))


def test_the_cosine_between_tokens_is_that_of_a_double_loop() -> None:
    states = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 1, 2, 4])
    expected, rows = 0.0, 0
    for row, length in zip(states.double().numpy(), lengths.tolist(), strict=True):
        pairs = [(a, b) for a in range(length) for b in range(length) if a != b]
        if pairs:
            cosines = [row[a] @ row[b] / np.sqrt((row[a] @ row[a]) * (row[b] @ row[b])) for a, b in pairs]
            expected, rows = expected + float(np.mean(cosines)), rows + 1
    total, count = token_cosine(states, valid_tokens(lengths, states.shape[1]))
    assert total.dtype == torch.float64
    assert (total.item(), count.item()) == (pytest.approx(expected, rel=1e-6), rows)
    assert rows == 3


def test_padding_scale_and_width_do_not_show_in_the_cosine() -> None:
    states, lengths = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 3, 2])
    plain, _ = token_cosine(states, valid_tokens(lengths, states.shape[1]))
    padded = torch.full((3, 9, 4), torch.nan)
    for row, length in enumerate(lengths.tolist()):
        padded[row, :length] = states[row, :length] * (row + 2)
    changed, count = token_cosine(padded, valid_tokens(lengths, 9))
    assert (changed.item(), count.item()) == (pytest.approx(plain.item(), abs=1e-6), 3)


def test_equal_tokens_have_cosine_one_and_rows_of_one_token_none() -> None:
    total, count = token_cosine(
        torch.ones(2, 3, 4) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1), valid_tokens(torch.tensor([3, 1]), 3)
    )
    assert (total.item(), count.item()) == (pytest.approx(1.0), 1)
    total, count = token_cosine(torch.randn(2, 3, 4), valid_tokens(torch.tensor([1, 0]), 3))
    assert (total.item(), count.item()) == (0, 0)


def layer(quantizer: str, bits: int, granularity: str) -> tuple[nn.Module, QuantizedLinear]:
    """A module `layer` with one quantized matrix."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) ** 3 + 0.02
    made = make(quantizer, weight, bits, granularity)
    linear = QuantizedLinear(weight, None, made, InputQuantizer(32, True, "token"))
    return nn.ModuleDict({"layer": linear}), linear


def looked(linear: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps of what the forward pass uses, from its values alone."""
    assert linear.quantizer is not None
    codes, step = linear.quantizer.freeze(linear.weight)
    return codes.numpy().astype(np.float64), step.double().numpy()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(("quantizer", "bits", "grid"), CASES)
def test_a_look_tells_what_direct_computation_tells(
    quantizer: str, bits: int, grid: tuple[int, int, float], granularity: str
) -> None:
    low, high, shift = grid
    model, linear = layer(quantizer, bits, granularity)
    watch = Watch()
    codes, step = looked(linear)
    weight = linear.weight.detach().double().numpy()
    magnitude = np.abs(weight).mean(1, keepdims=True) if granularity == "per_channel" else np.abs(weight).mean()
    outermost = step * max(abs(low + shift), abs(high + shift))
    facts = watch.look(model, 30)
    assert facts.keys() == {"layer"}
    assert facts["layer"].keys() == {"gamma", "zeros"}  # nothing to compare with yet
    assert facts["layer"]["gamma"] == pytest.approx(float((outermost / magnitude).mean()), rel=1e-5)
    zeros = float((codes == 0).mean()) if shift == 0 else 0.0
    assert facts["layer"]["zeros"] == pytest.approx(zeros, rel=1e-6)
    with torch.no_grad():
        linear.weight += 0.3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(3))
    later, _ = looked(linear)
    changed = float((later != codes).mean())
    assert 0 < changed < 1
    facts = watch.look(model, 55)
    assert facts["layer"]["changed_per_100_steps"] == pytest.approx(changed * 100 / 25, rel=1e-6)
    assert watch.look(model, 56)["layer"]["changed_per_100_steps"] == 0


def test_a_row_of_zeros_has_no_gamma() -> None:
    model, linear = layer("quantgpt", 2, "per_channel")
    plain = Watch().look(model, 0)["layer"]
    with torch.no_grad():
        linear.weight[2] = 0
    assert linear.quantizer is not None
    dead = Watch().look(model, 0)["layer"]
    assert np.isfinite(dead["gamma"])
    assert dead["gamma"] == pytest.approx(plain["gamma"], rel=1e-6)  # gamma is 1 in every row
    assert dead["zeros"] > plain["zeros"]


def test_a_look_leaves_the_model_alone_and_remembers_copies() -> None:
    model, linear = layer("lsq", 2, "per_channel")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch()
    watch.look(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = watch.codes["layer"].clone()
    with torch.no_grad():
        linear.weight.neg_()
    assert torch.equal(watch.codes["layer"], kept)


def test_full_precision_has_no_modules() -> None:
    assert Watch().look(nn.Linear(3, 3), 0) == {}
    assert weight_histograms(nn.Linear(3, 3)) == {}


@pytest.mark.parametrize(("quantizer", "bits", "grid"), CASES)
def test_a_histogram_holds_every_weight_and_where_the_grid_ends(
    quantizer: str, bits: int, grid: tuple[int, int, float]
) -> None:
    low, high, shift = grid
    model, linear = layer(quantizer, bits, "per_channel")
    weight = linear.weight.detach().double().numpy()
    found = weight_histograms(model)["layer"]
    relative = np.clip(weight / np.abs(weight).mean(), -6, 6)
    expected, _ = np.histogram(relative, bins=60, range=(-6, 6))
    assert sum(found["counts"]) == weight.size
    assert np.abs(np.subtract(found["counts"], expected)).sum() <= 2  # a weight on an edge, in fp32
    assert found["counts"][-1] > 0  # what lies beyond is counted in the outer bins
    _, step = looked(linear)
    mean = np.abs(weight).mean()
    assert found["highest_level"] == pytest.approx(step.mean() * (high + shift) / mean, rel=1e-5)
    assert found["lowest_level"] == pytest.approx(step.mean() * (low + shift) / mean, rel=1e-5)


def test_a_finished_run_has_its_modules_and_histograms(finished: Ran) -> None:
    folder, record = finished.folder("distill"), finished.record("distill")
    assert {"modules.json", "histograms.json", "history.json"} <= record.files.keys()
    looks, histograms, history = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("modules", "histograms", "history")
    )
    assert [look["step"] for look in looks] == [0, 5, 10, 12]
    assert [e["step"] for e in history if "token_cosine" in e] == [0, 5, 10, 12]
    assert all(-1 <= e["token_cosine"] <= 1 for e in history if "token_cosine" in e)
    names = list(histograms)
    assert len(names) == 1 + 2 * 4  # the word embedding, and four matrices a layer of GPT-2
    for look in looks:
        assert list(look["modules"]) == names
        for facts in look["modules"].values():
            assert ("changed_per_100_steps" in facts) == (look["step"] > 0)
            assert 0 < facts["zeros"] < 1
    model = load_model(finished.folder("finetune") / "model")
    make_student(model, finished.plan.config.quant.spec(), family_named("gpt2"))
    if looks[-1]["step"] != record.best_step:
        looks = [look for look in looks if look["step"] == record.best_step]
    load_parameters(model, load_file(folder / "weights.safetensors"))
    direct = Watch().look(model, 0)
    for name, facts in looks[-1]["modules"].items():  # of the weights that ship
        assert {key: facts[key] for key in ("gamma", "zeros")} == pytest.approx(direct[name], rel=1e-6)
    stored = load_file(folder / "weights.safetensors")
    for name, histogram in histograms.items():
        assert sum(histogram["counts"]) == stored[f"{name}.weight"].numel()
        assert histogram["lowest_level"] == -histogram["highest_level"] < 0


def test_a_teacher_has_neither(finished: Ran) -> None:
    assert "modules.json" not in finished.record("finetune").files
    history = json.loads((finished.folder("finetune") / "history.json").read_text())
    assert not any("token_cosine" in entry for entry in history)


def looks_of(case: Case, recipe: Distill, name: str, stop_at: tuple[int, ...] = ()) -> Any:
    """Looks and history of a run that is stopped after some steps and started again from the store."""
    run = case.run(recipe, name, checkpoint_minutes=9)
    for stop in stop_at:
        run_until(case.loop(run, Quant(bits="2-2-8")), stop)
    loop = case.loop(run, Quant(bits="2-2-8"))
    loop.run()
    return loop.progress.modules, loop.progress.history


@pytest.fixture(scope="module")
def undisturbed(case: Case) -> Any:
    return looks_of(case, RECIPE, "undisturbed")


RECIPE = Distill(steps=24, batch_size=6, lr=5e-3, negatives=4, eval_every=8, eval_rows=5)


@pytest.mark.parametrize("stop_at", [(5,), (10, 20), (16,), (23,)], ids=str)
def test_an_interrupted_run_saw_what_an_undisturbed_one_saw(
    case: Case, undisturbed: Any, stop_at: tuple[int, ...]
) -> None:
    looks, history = looks_of(case, RECIPE, f"disturbed{stop_at[0]}", stop_at)
    assert json.dumps(looks) == json.dumps(undisturbed[0])
    assert json.dumps(history) == json.dumps(undisturbed[1])
    assert [look["step"] for look in looks] == [0, 8, 16, 24]
    assert any(facts["changed_per_100_steps"] > 0 for facts in looks[-1]["modules"].values())


def test_there_are_about_fifty_looks_however_often_a_run_validates(case: Case) -> None:
    recipe = RECIPE.model_copy(update={"steps": 55, "eval_every": 1, "batch_size": 1, "eval_rows": 1})
    looks, history = looks_of(case, recipe, "often")
    steps = [look["step"] for look in looks]
    assert (steps[0], steps[-1]) == (0, 55)
    assert 25 <= len(steps) <= 52
    assert len([entry for entry in history if "validation_nats" in entry]) == 56


def test_a_run_of_no_steps_looks_once(case: Case) -> None:
    recipe = RECIPE.model_copy(update={"steps": 0})
    looks, history = looks_of(case, recipe, "none")
    assert [look["step"] for look in looks] == [0]
    assert [sorted(entry) for entry in history] == [["step", "token_cosine", "validation_nats"]]
