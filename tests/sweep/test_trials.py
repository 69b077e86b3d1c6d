"""A space of values: what is refused and by what name, what is drawn, how trials are scored."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from pipeline.config.laid_over import label, laid_over
from pipeline.config.run import Config
from pipeline.config.sweep import Between, Sweep
from pipeline.errors import ConfigError
from pipeline.store.keys import step_key
from pipeline.sweep.trials import check_sweep, drawn, listed, naming_versions, scores

SPACE = {"quant.bits": ["2-2-8", "4-4-8"]}


def test_a_grid_has_every_combination_in_order():
    sweep = Sweep(space={**SPACE, "distill.lr": [1e-3, 1e-4]})
    assert [tuple(values.values()) for values in listed(sweep)] == [
        ("2-2-8", 1e-3),
        ("2-2-8", 1e-4),
        ("4-4-8", 1e-3),
        ("4-4-8", 1e-4),
    ]


def test_random_draws_are_a_function_of_seed_and_index():
    sweep = Sweep(space={**SPACE, "distill.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, search="random", samples=9)
    first = listed(sweep)
    assert first == listed(sweep)
    assert len(first) == 9
    assert first[:4] == listed(sweep.model_copy(update={"samples": 4}))
    assert all(1e-4 <= values["distill.lr"] <= 1e-2 for values in first)
    assert listed(sweep.model_copy(update={"seed": 1})) != first
    few = Sweep(space=SPACE, search="random", samples=9)
    assert sorted(values["quant.bits"] for values in listed(few)) == ["2-2-8", "4-4-8"]


def test_what_trials_start_from_is_named_by_version():
    space = {**SPACE, "distill.start": ["m@champion", None, "m/3"], "distill": [{"start": "m@new"}, {"seed": 1}]}
    named = naming_versions(Sweep(space=space), {"m@champion": "m/3", "m/3": "m/3", "m@new": "m/9"}.__getitem__)
    assert named.space == {
        **SPACE,
        "distill.start": ["m/3", None, "m/3"],
        "distill": [{"start": "m/9"}, {"seed": 1}],
    }
    drawn_at_random = Sweep(space={"distill.lr": {"low": 1, "high": 2}}, search="random", samples=1)
    assert naming_versions(drawn_at_random, str) == drawn_at_random


def test_ranges_reach_both_ends():
    whole = Between(low=2, high=4, integer=True)
    assert [whole.at(share) for share in (0.0, 0.34, 0.5, 0.99, 1.0)] == [2, 3, 3, 4, 4]
    decades = Between(low=1e-4, high=1e-2, log=True)
    assert decades.at(0.5) == pytest.approx(1e-3)
    steps = Between(low=1, high=100, log=True, integer=True)
    assert [steps.at(share) for share in (0.0, 0.5, 1.0)] == [1, 10, 100]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "space is empty, so there is nothing to sweep"),
        ({"space": {"quant.bits": []}}, r"space\[quant.bits\] is an empty list"),
        ({"space": SPACE, "objectives": ["speed"]}, "no trial reports 'speed'; valid: gap, bytes"),
        ({"space": SPACE, "objectives": []}, "name at least one"),
        ({"space": {"distill.lr": {"low": 1, "high": 2}}}, "grid needs lists, and distill.lr is a range"),
        ({"space": SPACE, "search": "optuna"}, "optuna needs samples"),
        ({"space": SPACE, "samples": 3}, "a grid is tried whole"),
        ({"space": {"distill.lr": {"low": 2, "high": 1}}, "search": "random", "samples": 1}, "low must be the smaller"),
        ({"space": {"distill.seed": list(range(1001))}}, "more than 1000 trials"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        Sweep(**fields)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"quant.bit": [1]}, r"'quant.bit' is no path .* at 'bit'; valid: .*bits"),
        ({"quantum": [1]}, r"'quantum' is no path .* valid: .*quant"),
        ({"resources.workers": [1, 2]}, "'resources.workers' is no path"),
        ({"quant.bits.weights": [1]}, "goes below 'bits', which is a value"),
    ],
)
def test_a_path_must_be_in_the_schema(tiny_config, tmp_path, space, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(tiny_config(tmp_path, sweep={"space": space}))


def test_paths_below_free_mappings_and_whole_sections_are_taken(tiny_config, tmp_path):
    base = tiny_config(tmp_path)
    wider = laid_over(base, {"model.source.n_embd": 64, "quant": {"bits": "4-4-8"}, "quant.overrides": {"h.0": 8}})
    assert wider.model.source["n_embd"] == 64
    assert (wider.quant.bits, wider.quant.overrides, wider.quant.quantizer) == ("4-4-8", {"h.0": 8}, "quantgpt")
    check_sweep(tiny_config(tmp_path, sweep={"space": {"model.source.n_embd": [32], "quant": [{"bits": "4-4-8"}]}}))


def test_an_impossible_combination_is_named(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"quantizer=twn bits=4-4-8 is impossible.*ternary weights only"):
        laid_over(tiny_config(tmp_path), {"quant.quantizer": "twn", "quant.bits": "4-4-8"})


def test_a_metric_of_another_task_is_refused(tiny_config, tmp_path):
    config = tiny_config(tmp_path, sweep={"space": SPACE, "objectives": ["rougeL", "bytes"]})
    with pytest.raises(ConfigError, match="no trial of the task language_modeling reports 'rougeL'"):
        check_sweep(config)


def test_without_the_section_or_without_ray_for_asha_it_is_said(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="no section sweep"):
        check_sweep(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match=r"sweep.asha .* set resources.workers to 1 or more"):
        check_sweep(tiny_config(tmp_path, sweep={"space": SPACE, "asha": {"grace_steps": 5}}))


def test_a_trial_is_the_configuration_that_compress_would_get(tiny_config, tmp_path):
    base = tiny_config(tmp_path, sweep={"space": SPACE})
    plain = tiny_config(tmp_path, quant={"bits": "4-4-8"})
    assert laid_over(base, {"quant.bits": "4-4-8"}) == plain
    assert isinstance(laid_over(base, {}), Config)


def test_scores_are_minimised_whatever_is_better():
    student = {"perplexity": 20.0, "kl_nats": 0.1, "top1_agreement": 0.9}
    found = scores(("gap", "bytes", "top1_agreement", "kl_nats"), {"perplexity": 10.0}, student, 5)
    assert found == (pytest.approx(math.log(2)), 5.0, -0.9, 0.1)


def test_a_label_says_the_values():
    sweep = Sweep(space={"distill.lr": {"low": 1e-3, "high": 2e-3}}, search="random", samples=1)
    assert label(drawn(sweep, 0)).startswith("lr=0.001")
    assert label({"quant.overrides": {"h": 8}}) == 'overrides={"h": 8}'
    assert label({"quant.overrides": {"transformer.h.0": 8, "transformer.h.1": 4}}) == "overrides={2 entries}"
    assert step_key("x", 1, drawn(sweep, 0), {}) == step_key("x", 1, drawn(sweep, 0), {})
