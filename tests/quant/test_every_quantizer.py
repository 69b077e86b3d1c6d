"""Laws that hold for each quantizer, alone and in a run."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import load_parameters, make_student
from pipeline.package.package import read_package
from pipeline.quant.grid import dequantize
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.quant.quantizers.base import REACH, after_step
from pipeline.quant.spec import QuantizerName, levels_of
from pipeline.store.records import Student, Tokens
from pipeline.store.shards import Rows
from pipeline.training.checkpoints import latest_checkpoint, load_checkpoint
from tests.quant.cases import GRANULARITIES, example, make, passed, trained
from tests.training.cases import Case
from tests.training.test_trainer import DISTILL, weights_after

TERNARY = ("twn", "statistics")
CASES = [
    (name, bits, granularity)
    for name in QUANTIZERS
    for bits in ((2,) if name in TERNARY else (2, 4, 8))
    for granularity in GRANULARITIES
]
LEARN_A_RATIO = ("lsq", "lsq_symmetric", "seq")
each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
each_case = pytest.mark.parametrize(("name", "bits", "granularity"), CASES)
LEARNED = {
    "quantgpt": {"gamma"}, "pact": {"low", "high"}, "lsq": {"gamma"}, "lsq_symmetric": {"gamma"}, "seq": {"gamma"},
    "laq": set(), "laq_uniform": set(), "twn": set(), "statistics": set(),
}  # fmt: skip


def test_every_name_has_its_quantizer():
    assert set(QUANTIZERS) == set(get_args(QuantizerName)) == set(LEARNED)


@each_quantizer
def test_what_is_learned_and_what_is_computed(name):
    quantizer = make(name, example()[0])
    assert {key for key, p in quantizer.named_parameters() if p.requires_grad} == LEARNED[name]
    computed = {key for key, p in quantizer.named_parameters() if not p.requires_grad}
    assert computed == ({"scale"} if name.startswith("laq") else {"first"} if name in LEARN_A_RATIO else set())
    assert list(quantizer.buffers()) == []


@each_case
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_freeze_gives_the_numbers_of_the_forward_pass_before_and_after_training(name, bits, granularity, scale):
    weight, upstream = example(torch.float32, scale)
    quantizer = make(name, weight, bits, granularity)
    for latent in (weight, trained(quantizer, weight, upstream, lr=1e-2 * scale)):
        codes, step = quantizer.freeze(latent)
        assert codes.dtype == torch.int8
        assert step.shape == ((9, 1) if granularity == "per_channel" else (1, 1))
        shipped, forward = dequantize(codes, step, quantizer.grid), quantizer(latent).detach()
        assert torch.equal(shipped.view(torch.int32), forward.view(torch.int32))
        assert quantizer.grid.low <= int(codes.min()) <= int(codes.max()) <= quantizer.grid.high


@each_quantizer
def test_what_was_frozen_does_not_follow_further_training(name):
    weight, _ = example(torch.float32)
    quantizer = make(name, weight)
    codes, step = quantizer.freeze(weight)
    before = codes.clone(), step.detach().clone()
    with torch.no_grad():
        for tensor in (weight, *quantizer.parameters()):
            tensor.mul_(1.5)
    assert torch.equal(codes, before[0])
    assert torch.equal(step, before[1])
    assert not step.requires_grad


@each_case
def test_nothing_but_weight_and_parameters_decides_what_ships(name, bits, granularity):
    weight, upstream = example(torch.float32)
    quantizer = make(name, weight, bits, granularity)
    latent = trained(quantizer, weight, upstream)
    other = make(name, torch.randn_like(weight), bits, granularity)
    other.load_state_dict(quantizer.state_dict())
    for ours, theirs in zip(other.freeze(latent), quantizer.freeze(latent), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "bits"), dict.fromkeys((name, bits) for name, bits, _ in CASES))
def test_one_row_does_not_depend_on_the_others(name, bits):
    weight, upstream = example(torch.float32)
    together, alone = make(name, weight, bits, "per_channel"), make(name, weight[3:4], bits, "per_channel")
    latent, latent_row = trained(together, weight, upstream), trained(alone, weight[3:4], upstream[3:4])
    torch.testing.assert_close(latent[3:4], latent_row)
    torch.testing.assert_close(together(latent)[3:4], alone(latent_row))


@each_case
@pytest.mark.parametrize("gamma_init", ["auto", "mse"])
def test_zero_rows_give_zeros_and_finite_gradients_and_stay_zeros(name, bits, granularity, gamma_init):
    """A padding row gets no gradient through an embedding."""
    weight, upstream = example(torch.float32)
    rows = slice(1, 2) if granularity == "per_channel" else slice(None)
    weight[rows] = 0
    quantizer = make(name, weight, bits, granularity, gamma_init=gamma_init)
    quantized, dw = passed(quantizer, weight, upstream)
    assert not quantized[rows].any()
    assert torch.from_numpy(dw).isfinite().all()
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in learned)
    upstream[rows] = 0
    latent = trained(quantizer, weight, upstream)
    codes, step = quantizer.freeze(latent)
    assert not latent[rows].any()
    assert not codes[rows].any()
    assert (step[rows] == 0).all()
    assert not quantizer(latent)[rows].any()
    assert all(p.isfinite().all() for p in quantizer.parameters())
    assert latent.isfinite().all()


@pytest.mark.parametrize("name", ["quantgpt", "lsq", "lsq_symmetric", "seq", "statistics"])
def test_where_the_gradient_ends_at_the_grid_a_zero_row_gets_none(name):
    weight, upstream = example(torch.float32)
    weight[1] = 0
    latent = trained(make(name, weight, 2, "per_channel"), weight, upstream)
    assert not latent[1].any()
    assert (latent[0] != weight[0]).any()


@each_quantizer
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_row_that_comes_alive_stays_finite(name, granularity):
    weight, upstream = example(torch.float32)
    weight[1] = 0
    quantizer = make(name, weight, 2, granularity, ste="identity")
    latent = trained(quantizer, weight, upstream, steps=20)
    assert latent.isfinite().all()
    assert quantizer(latent).isfinite().all()
    assert all(p.isfinite().all() for p in quantizer.parameters())
    codes, step = quantizer.freeze(latent)
    assert codes.isfinite().all()
    assert step.isfinite().all()
    if (
        name in ("laq", "laq_uniform", "twn", "statistics") and granularity == "per_channel"
    ):  # whose step follows the weights
        assert latent[1].any()
        assert codes[1].any()
        assert step[1] > 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, math.nan) for name in QUANTIZERS),
        *((name, math.inf) for name in QUANTIZERS if name != "pact"),  # whose clip bounds an infinity too
    ],
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_freeze_refuses_a_diverged_weight(name, bad, granularity):
    weight, _ = example(torch.float32)
    quantizer = make(name, weight, 2, granularity)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer.freeze(weight)


@each_quantizer
def test_training_sees_a_nan_as_a_nan(name):
    weight, _ = example(torch.float32)
    quantizer = make(name, weight)
    weight[2, 3] = math.nan
    assert quantizer(weight)[2, 3].isnan()


PUBLISHED = dict.fromkeys(QUANTIZERS, "clipped") | {
    "seq": "wide", "twn": "identity", "laq": "identity", "laq_uniform": "identity"
}  # fmt: skip
PUBLISHED.pop("pact")


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_straight_through_gradient_is_the_published_one_unless_told(name, published):
    weight, upstream = example()
    found = {ste: passed(make(name, weight, ste=ste), weight, upstream)[1] for ste in ("auto", *REACH)}
    assert (found["auto"] == found[published]).all()
    passing = [(found[ste] != 0).sum() for ste in ("clipped", "wide", "identity")]
    assert passing == sorted(set(passing))  # each lets more through than the one before
    assert (found["identity"] == upstream.numpy()).all()
    assert (found["clipped"] == 0).any()


@each_case
def test_a_few_steps_down_the_error_lower_it(name, bits, granularity):
    """Towards a target on the quantizer's own grid, by the gradient of the squared error."""
    weight, _ = example(torch.float32, scale=0.1)
    target = make(name, weight, bits, granularity)(weight).detach() * 1.3
    latent = torch.nn.Parameter(weight.clone())
    quantizer = make(name, weight, bits, granularity)
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([latent, *learned], lr=3e-3, weight_decay=0.0)
    errors = []
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        error = (quantizer(latent) - target).square().sum()
        error.backward()
        optimizer.step()
        after_step([(quantizer, latent, optimizer.state[latent]["exp_avg_sq"])])
        errors.append(error.item())
    assert min(errors[-5:]) < 0.65 * errors[0]


@each_quantizer
def test_a_run_with_any_quantizer_ends_in_a_package_of_the_trained_student(name, tiny_config, run_flow, cloned):
    config = tiny_config(cloned, quant={"quantizer": name}, distill={"steps": 5, "eval_every": 2})
    ran = run_flow(config, until="pack")
    assert ran.outcome.status == {
        **dict.fromkeys(("tokenize", "finetune", "cache"), "reused"),
        **dict.fromkeys(("distill", "evaluate", "pack"), "done"),
    }
    scores = ran.record("evaluate").student
    assert all(math.isfinite(value) for value in scores.values())
    assert scores["perplexity"] < 300  # tokens of the vocabulary

    frozen, _, quantization = read_package(ran.package)
    assert frozen.levels == quantization["levels"] == levels_of(name)
    assert len(frozen.codes) == 2 * 4 + 1

    student = build(read_config(ran.folder("finetune") / "model"), seed=1)
    make_student(student, config.quant.spec(), family_named("gpt2"))
    load_parameters(student, load_file(ran.folder("distill") / Student.WEIGHTS))
    ids, _, _ = Rows(ran.plan.step(Tokens).dir, ran.record("tokenize").splits["test"].shards).get(range(4))
    with torch.no_grad():
        assert torch.equal(pipeline.load(ran.package)(ids).logits, student.eval()(ids).logits)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("quantizers"))


BEST = PRESETS["best"]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"quantizer": "laq"}, {}),
        ({"quantizer": "lsq", "granularity": "per_channel"}, {}),
        (BEST["quant"], BEST["distill"]),  # Muon's momentum, and quantization that fades in
    ],
    ids=["laq", "lsq", "best"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(
    case: Case, options: dict[str, Any], values: dict[str, Any]
) -> None:
    recipe = Distill(**{**DISTILL, **values, "steps": 15, "eval_every": 15})
    quant = Quant(bits="2-2-8", **options)
    ended = []
    for name, stop_at in (("undisturbed", ()), ("disturbed", (6, 11))):
        run = case.run(recipe, f"{name}-{quant.quantizer}", checkpoint_minutes=2)
        weights_after(case, run, quant, stop_at)
        found = latest_checkpoint(run.dir)
        assert found is not None
        tensors, progress = load_checkpoint(run.dir, found)
        assert progress.step == 14
        ended.append(tensors)
    undisturbed, disturbed = ended
    assert undisturbed.keys() == disturbed.keys()
    assert all(torch.equal(disturbed[key], undisturbed[key]) for key in undisturbed)
    started = case.loop(case.run(recipe, f"start-{quant.quantizer}"), quant).model.model
    sizes = {name: p for name, p in started.named_parameters() if name.endswith(("quantizer.scale", "quantizer.gamma"))}
    assert len(sizes) == 2 * 4 + 1
    assert all((undisturbed[f"model.{name}"] != size).any() for name, size in sizes.items())
