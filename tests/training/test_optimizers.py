"""Options of the training sections reach the parameters they name, and are part of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.quant.granularity import PER_CHANNEL
from pipeline.quant.modules import QuantizedWeight, quantizers
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.spec import QuantizerName
from pipeline.store.keys import recipe_of
from pipeline.training.trainer import Trainer
from tests.training.cases import WIDTH, Case

LR, GAMMA_LR = 1e-3, 3e-3
BASE: dict[str, Any] = {"steps": 10, "batch_size": 4, "lr": LR, "clip_norm": None, "eval_every": 10}
DISTILL = {**BASE, "gamma_lr": GAMMA_LR, "contrast_weight": 0.0}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("optimizers"))


def made(case: Case, recipe: Finetune | Distill, quantizer: QuantizerName = "quantgpt") -> Trainer:
    return case.loop(case.run(recipe, "options"), Quant(quantizer=quantizer))


def kinds(loop: Trainer) -> dict[str, str]:
    """What each trained parameter is, by its name alone."""
    found = {}
    for name, parameter in loop.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".quantizer." in name:
            found[name] = "scale"
        elif name.endswith("wte.weight"):
            found[name] = "table"
        else:
            found[name] = "vector" if parameter.ndim == 1 or name.endswith("wpe.weight") else "matrix"
    return found


def groups(loop: Trainer) -> Iterable[dict[str, Any]]:
    return [group for optimizer in loop.optimizers.all for group in optimizer.param_groups]


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_every_parameter_that_learns_is_in_one_group_with_its_own_rate(case: Case, quantizer: QuantizerName) -> None:
    recipe = Distill(**DISTILL, vector_lr_scale=0.5, embedding_lr_scale=0.25, weight_decay=0.1, betas=(0.8, 0.97))
    loop = made(case, recipe, quantizer)
    named = {id(parameter): name for name, parameter in loop.model.named_parameters()}
    of = kinds(loop)
    rates = {"matrix": LR, "table": LR * 0.25, "vector": LR * 0.5, "scale": GAMMA_LR}
    seen = []
    for group in groups(loop):
        for parameter in group["params"]:
            name = named[id(parameter)]
            seen.append(name)
            assert group["lr"] == pytest.approx(rates[of[name]]), name
            assert group["weight_decay"] == (0.1 if of[name] in ("matrix", "table") else 0), name
            assert group["betas"] == (0.8, 0.97)
    assert sorted(seen) == sorted(of)
    moved_alike = [(group["lr"], group["weight_decay"]) for group in groups(loop)]
    assert len(set(moved_alike)) == len(moved_alike)
    assert set(of.values()) == {"matrix", "table", "vector"} | ({"scale"} if learns(loop) else set())


def learns(loop: Trainer) -> bool:
    return any(p.requires_grad for _, _, quantizer in quantizers(loop.model) for p in quantizer.parameters())


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, {}),
        ({"vector_lr_scale": 0.01}, {"vector": 0.01}),
        ({"embedding_lr_scale": 4.0}, {"table": 4.0}),
        ({"vector_lr_scale": 2.0, "embedding_lr_scale": 0.1}, {"vector": 2.0, "table": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Distill, Finetune])
def test_the_first_step_of_adam_moves_each_parameter_by_its_rate(
    case: Case, kind: type[Distill] | type[Finetune], options: dict[str, float], scales: dict[str, float]
) -> None:
    recipe = Distill(**DISTILL, **options) if kind is Distill else Finetune(**BASE, dropout=0.0, **options)
    loop = made(case, recipe)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.train_step(0)
    moved: dict[str, float] = {}
    of = kinds(loop)
    for name, parameter in loop.model.named_parameters():
        change = float((parameter.detach() - before[name]).abs().max())
        moved[of[name]] = max(moved.get(of[name], 0.0), change)
    expected = {"matrix": LR, "table": LR, "vector": LR} | ({"scale": GAMMA_LR} if kind is Distill else {})
    expected = {name: rate * scales.get(name, 1.0) for name, rate in expected.items()}
    assert moved == pytest.approx(expected, rel=0.02)


def test_betas_make_the_second_step_what_adam_says(case: Case) -> None:
    first, second = 0.5, 0.7
    loop = made(case, Finetune(**BASE, dropout=0.0, betas=(first, second)))
    weight = dict(loop.model.named_parameters())["model.transformer.ln_f.bias"]
    m, v = torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for step in (0, 1):
        before = weight.detach().double().clone()
        loop.backward(step)
        assert weight.grad is not None
        g = weight.grad.double().clone()
        loop.train_step(step)
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
        rate = LR + (1e-6 - LR) * step / 10
        update = m / (1 - first ** (step + 1)) / (torch.sqrt(v / (1 - second ** (step + 1))) + 1e-8)
        torch.testing.assert_close(weight.detach().double(), before - rate * update, rtol=1e-4, atol=1e-7)


OPTIONS: list[tuple[type[Finetune] | type[Distill], str, Any, Any]] = [
    *(
        (kind, *option)
        for kind in (Finetune, Distill)
        for option in (
            ("betas", (0.9, 0.999), (0.9, 0.95)),
            ("vector_lr_scale", 1.0, 2.0),
            ("embedding_lr_scale", 1.0, 0.5),
            ("schedule", "linear", "cosine"),
            ("optimizer", "adam", "muon"),
        )
    ),
    (Distill, "fade_in", 0.0, 0.2),
    (Distill, "negatives_from", "teacher", "batch"),
    (Distill, "contrast_layer", -1, -2),
]


def test_a_recipe_without_a_start_is_as_it_was_before_there_was_one() -> None:
    assert "start" not in recipe_of(Distill(steps=3))
    assert recipe_of(Distill(steps=3, start="tiny/1"))["start"] == "tiny/1"


@pytest.mark.parametrize(("kind", "option", "default", "other"), OPTIONS)
def test_an_option_changes_itself_alone_in_the_recipe_and_its_default_nothing(
    kind: Any, option: str, default: Any, other: Any
) -> None:
    old = recipe_of(kind(steps=3))
    assert old[option] == (list(default) if isinstance(default, tuple) else default)
    assert recipe_of(kind(steps=3, **{option: default})) == old
    changed = recipe_of(kind(steps=3, **{option: other}))
    assert changed == {**old, option: list(other) if isinstance(other, tuple) else other}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("vector_lr_scale", 0),
        ("embedding_lr_scale", -1),
        ("embedding_lr_scale", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.5),
        ("negatives", 0),
        ("fade_in", 1.5),
        ("muon_lr", 0),
        ("negatives_from", "bank"),
        ("steps", -1),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        Distill(**{"steps": 3, option: value})


MUON = {"optimizer": "muon", "muon_lr": 0.02, "muon_momentum": 0.5}


def test_muon_moves_each_matrix_by_its_rate_times_its_own_size_and_adam_the_rest(case: Case) -> None:
    loop = made(case, Distill(**DISTILL, **MUON))
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.train_step(0)
    of = kinds(loop)
    adams: dict[str, float] = {}
    for name, parameter in loop.model.named_parameters():
        change = parameter.detach() - before[name]
        if of[name] == "matrix":  # orthogonalised by five iterations, so the size is met within a third
            ratio = float(change.square().mean().sqrt() / before[name].square().mean().sqrt())
            assert ratio == pytest.approx(0.02, rel=0.35), name
        else:
            adams[of[name]] = max(adams.get(of[name], 0.0), float(change.abs().max()))
    assert adams == pytest.approx({"table": LR, "vector": LR, "scale": GAMMA_LR}, rel=0.02)
    twice = made(case, Distill(**DISTILL, **{**MUON, "muon_lr": 0.04}))
    twice.train_step(0)
    for name, parameter in twice.model.named_parameters():
        if of[name] == "matrix":
            moved = dict(loop.model.named_parameters())[name].detach() - before[name]
            torch.testing.assert_close(parameter.detach() - before[name], 2 * moved, rtol=1e-3, atol=1e-6)


def test_muons_settings_are_in_the_recipe_and_refused_without_it() -> None:
    old = recipe_of(Distill(steps=3, optimizer="muon"))
    changed = recipe_of(Distill(steps=3, optimizer="muon", muon_momentum=0.9, muon_lr=0.1))
    assert changed == {**old, "muon_momentum": 0.9, "muon_lr": 0.1}
    for knob in ("muon_lr", "muon_momentum"):
        with pytest.raises(ValueError, match=f"{knob} is 0.3 and has no effect.*optimizer: muon"):
            Distill(steps=3, **{knob: 0.3})


def test_quantization_fades_in_over_a_fraction_of_the_steps_and_never_shows_outside_of_training(case: Case) -> None:
    loop = made(case, Distill(**{**DISTILL, "steps": 8}, fade_in=0.5))
    ids = torch.arange(WIDTH).view(1, -1)
    blends = []
    for step in range(6):
        loop.train_step(step)
        blends.append({quantizer.blend for _, _, quantizer in quantizers(loop.model)})
        loop.model.eval()
        faded = loop.model(ids)[1]
        for _, _, quantizer in quantizers(loop.model):
            quantizer.blend = 1.0
        loop.model.train()
        assert torch.equal(faded, loop.model(ids)[1])  # what is validated is quantized in full
    assert blends == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}, {1.0}]


def test_a_blend_lies_between_the_weight_and_its_level() -> None:
    weight = torch.randn(4, 6)
    quantizer = QUANTIZERS["seq"](weight, 2, PER_CHANNEL, Quant(quantizer="seq").spec())
    level = quantizer(weight)
    quantizer.blend = 0.25
    module = QuantizedWeight(nn.Parameter(weight), quantizer)
    torch.testing.assert_close(module.on_grid(), 0.75 * weight + 0.25 * level)
    assert torch.equal(module.eval().on_grid(), level)


def test_only_a_student_may_take_no_steps() -> None:
    assert Distill(steps=0).steps == 0
    with pytest.raises(ValueError, match="steps"):
        Finetune(steps=0)


# What the papers say each quantizer has: a learned or searched start, the ablation, a choice of gradient.
STARTS = {"quantgpt", "pact", "lsq", "lsq_symmetric", "seq"}
TAKEN = {
    ("gamma_init", "mse"): STARTS,
    ("gamma_gradient", "outer"): {"quantgpt"},
    ("ste", "clipped"): set(QUANTIZERS) - {"pact"},
    ("ste", "identity"): set(QUANTIZERS) - {"pact"},
}


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
@pytest.mark.parametrize(("option", "value"), sorted(TAKEN))
def test_an_option_that_a_quantizer_does_not_take_is_refused(quantizer: str, option: str, value: str) -> None:
    if quantizer in TAKEN[option, value]:
        assert getattr(Quant(quantizer=quantizer, **{option: value}), option) == value
        return
    with pytest.raises(
        ValueError, match=f"{option} is {value}, which the quantizer {quantizer} does not take"
    ) as error:
        Quant(quantizer=quantizer, **{option: value})
    for taker in TAKEN[option, value]:
        assert taker in str(error.value)


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_defaults_go_with_every_quantizer(quantizer: str) -> None:
    told = Quant(quantizer=quantizer, gamma_init="auto", gamma_gradient="both", ste="auto")
    assert recipe_of(told) == recipe_of(Quant(quantizer=quantizer))
    assert recipe_of(told)["gamma_gradient"] == "both"
