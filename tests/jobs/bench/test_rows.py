"""Every recipe of the bench is a configuration wherever it is offered, and a trial is that over the base."""

from __future__ import annotations

import pytest

from jobs.bench.rows import (
    CONTRAST_WEIGHTS,
    PAPER,
    REFERENCE,
    ROWS,
    SMALLEST,
    WITH_CONTRAST,
    WITHOUT_CONTRAST,
    Row,
    Try,
)
from jobs.bench.students import SHIPPED, bench_run
from pipeline.config.presets import PRESETS, RATIO_LR, suited
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.quant.quantizers import QUANTIZERS
from pipeline.store.locations import anchored

FULL_WIDTHS = ["2-2-8", "4-4-8", "8-8-8"]
WIDTHS = [*FULL_WIDTHS, "2-2-32", "2-8-8", "2-4-8", "4-2-8", "2-32-8", "32-2-8", "8-8-32"]
MINIMAL = {"name": "tiny", "model": {"source": "a/b"}, "data": {"source": "*.txt"}, "distill": {"steps": 3}}
NAMED = {row.name: row for row in ROWS}
ROUNDING = "rounding, per_channel"
TRIED = Try(1e-3, 0.0)
TERNARY = {"twn, per_tensor", "twn, per_channel", "statistics, per_tensor", "statistics, per_channel", SMALLEST}


@pytest.fixture
def base():
    return Config.model_validate(MINIMAL)


def test_names_are_distinct_and_every_quantizer_has_a_row():
    assert len(NAMED) == len(ROWS)
    assert {row.quantizer for row in ROWS} == set(QUANTIZERS)
    assert set(PRESETS) <= set(NAMED)
    assert [row.name for row in ROWS if not row.trained] == [ROUNDING, "rounding, seq, per_channel"]


@pytest.mark.parametrize(
    ("row", "bits"),
    [pytest.param(row, b, id=f"{row.name}-{b}") for row in ROWS for b in WIDTHS if row.offered_at(b)],
)
def test_a_recipe_is_valid_at_every_width_it_is_offered(base, row, bits):
    made = bench_run(base, row, bits, Try(3e-3, 0.07), 4)
    config = Config.model_validate(made.config)
    assert config.quant.bits == bits
    distill = config.distill
    assert (getattr(distill, row.rate_knob), distill.contrast_weight, distill.seed) == (3e-3, 0.07, 4)
    assert (made.row, made.bits, *made.tried, made.seed) == (row.name, bits, 3e-3, 0.07, 4)
    for section in ("quant", "distill"):
        for name, value in suited(row.sections, bits, base.task.name).get(section, {}).items():
            if name in (row.rate_knob, "contrast_weight", *SHIPPED):  # the search's, and the same for all
                continue
            assert getattr(getattr(config, section), name) == value
    assert (config.distill.steps == 0) == (not row.trained)


def test_ternary_recipes_are_offered_at_two_bits_only():
    offered = {bits: {row.name for row in ROWS if row.offered_at(bits)} for bits in FULL_WIDTHS}
    assert offered["2-2-8"] == set(NAMED)
    assert set(NAMED) - offered["4-4-8"] == set(NAMED) - offered["8-8-8"] == TERNARY


def encodings(base, bits):
    offered = [row for row in ROWS if row.offered_at(bits, base.quant.overrides.values())]
    return {row.name: bench_run(base, row, bits, TRIED, 0).config["pack"]["encoding"] for row in offered}


def test_five_codes_a_byte_are_for_ternary_codes_alone(base):
    four_levels = {row.name for row in ROWS if row.quantizer in ("lsq", "seq")}
    for bits in ("2-2-8", "2-32-8", "32-2-8"):
        assert {name for name, encoding in encodings(base, bits).items() if encoding == "dense"} <= four_levels
    assert set(encodings(base, "2-2-8")) == set(NAMED)
    for bits in ("4-4-8", "8-8-8", "2-8-8"):
        assert set(encodings(base, bits).values()) == {"dense"}


def test_where_a_module_has_more_bits_no_row_is_ternary():
    base = Config.model_validate({**MINIMAL, "quant": {"overrides": {".*": 8}}})
    found = encodings(base, "2-2-8")
    assert set(found.values()) == {"dense"}
    assert set(NAMED) - set(found) == TERNARY


def test_what_does_not_go_together_is_refused_by_the_rows_name():
    base = Config.model_validate({**MINIMAL, "quant": {"attention": "qkv"}})
    said = "The row 'best' cannot be at 2-2-32(?s:.*)attention is qkv and has no effect"
    with pytest.raises(ConfigError, match=said):
        bench_run(base, NAMED["best"], "2-2-32", TRIED, 0)


def test_rounding_has_no_epochs_where_the_others_have(base):
    epochs = base.model_copy(update={"distill": base.distill.model_copy(update={"steps": None, "epochs": 1.0})})
    found = {name: bench_run(epochs, NAMED[name], "2-2-8", TRIED, 0).config["distill"] for name in (ROUNDING, "best")}
    assert {name: (d["steps"], d["epochs"]) for name, d in found.items()} == {ROUNDING: (0, None), "best": (None, 1.0)}


def test_a_trial_goes_to_workers_with_absolute_places(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = base.model_copy(update={"resources": base.resources.model_copy(update={"storage_uri": "./store"})})
    resources = bench_run(here, NAMED["best"], "2-2-8", TRIED, 0).config["resources"]
    assert (resources["storage_uri"], resources["workers"]) == (str(tmp_path / "store"), 0)
    assert resources["local_cache_dir"] == str(tmp_path / "store" / ".scratch")


@pytest.mark.parametrize(
    "sections",
    [{"preset": "best"}, {"preset": "smallest"}, {"quant": {"gamma_init": "mse"}}, {"quant": {"ste": "clipped"}}],
    ids=str,
)
def test_every_recipe_is_valid_over_whatever_configuration_is_given(sections):
    base, refused = Config.model_validate({**MINIMAL, **sections}), []
    for row in ROWS:
        try:
            Config.model_validate(bench_run(base, row, "2-2-8", TRIED, 0).config)
        except ValueError as error:
            refused.append(f"{row.name}: {error}")
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("preset", ["best", "smallest"])
def test_a_preset_of_the_base_is_part_of_no_recipe(base, preset):
    """`rates` chooses around what the row's own optimizer wants, and names say what a row is."""
    filled, changed = Config.model_validate({**MINIMAL, "preset": preset}), []
    for row in ROWS:
        fields = [bench_run(one, row, "2-2-8", TRIED, 0).config for one in (filled, base)]
        if any(fields[0][section] != fields[1][section] for section in ("quant", "distill")):
            changed.append(row.name)
    assert not changed


def test_a_trial_lays_its_values_over_the_base_and_leaves_it_alone(base):
    before = base.model_dump()
    distill = {"contrast_weight": 0.0, "lr": 9.0}
    row = Row("own", {"quant": {"granularity": "per_channel"}, "distill": distill, "pack": {}})
    config = Config.model_validate(bench_run(base, row, "2-2-8", TRIED, 2).config)
    assert base.model_dump() == before
    assert (config.quant.granularity, config.quant.bits) == ("per_channel", "2-2-8")
    assert (config.distill.lr, config.distill.contrast_weight, config.distill.steps) == (1e-3, 0.0, 3)
    assert config.pack.encoding == "base3"
    assert config.resources.workers == 0
    for section in ("name", "model", "task", "data", "finetune", "cache", "evaluate", "register_"):
        assert getattr(config, section) == getattr(base, section)
    assert config.resources == anchored(base.resources).model_copy(update={"workers": 0})


def config_of(base, name):
    row = NAMED[name]
    return Config.model_validate(bench_run(base, row, "2-2-8", row.own_try("2-2-8")._replace(rate=1e-3), 0).config)


def test_rows_of_contrast_differ_in_its_weight_alone(base):
    plain = config_of(base, WITHOUT_CONTRAST)
    assert plain.distill.contrast_weight == 0
    for name, weight in {REFERENCE: 0.03, **{name: weight for weight, name in WITH_CONTRAST.items()}}.items():
        distill = plain.distill.model_copy(update={"contrast_weight": weight})
        assert config_of(base, name) == plain.model_copy(update={"distill": distill})


def test_the_reference_differs_from_the_papers_recipe_in_start_and_rate_of_gamma_and_in_contrast(base):
    papers, scaled = config_of(base, PAPER), config_of(base, REFERENCE)
    assert (papers.quant.gamma_init, papers.distill.gamma_lr, papers.distill.contrast_weight) == ("one", 1e-3, 0.1)
    assert papers.quant.model_copy(update={"gamma_init": "auto"}) == scaled.quant
    changed = {"gamma_lr": RATIO_LR, "contrast_weight": scaled.distill.contrast_weight}
    assert papers.distill.model_copy(update=changed) == scaled.distill


def test_a_trial_is_the_same_whether_a_default_is_given_or_left_out(base):
    rows = [Row("one", {"quant": {}, "distill": distill}) for distill in ({}, {"gamma_lr": 1e-3}, {"gamma_lr": 2e-3})]
    left_out, given, other = (bench_run(base, row, "2-2-8", TRIED, 0).digest for row in rows)
    assert left_out == given != other
    elsewhere = base.model_copy(update={"resources": base.resources.model_copy(update={"micro_batch": 3})})
    assert bench_run(elsewhere, rows[0], "2-2-8", TRIED, 0).digest == left_out


@pytest.mark.parametrize("bits", FULL_WIDTHS)
def test_the_search_tries_as_many_rates_of_every_recipe(bits):
    for row in ROWS:
        tries = row.tries(bits)
        weights = CONTRAST_WEIGHTS if row.name == REFERENCE else (row.sections["distill"]["contrast_weight"],)
        assert tries == tuple(Try(rate, weight) for rate in row.rates(bits) for weight in weights)
        assert row.own_try(bits) == Try(row.rate(bits), weights[len(weights) // 2])
        if row.trained:
            low, middle, high = row.rates(bits)
            assert (middle / low, high / middle) == pytest.approx((2, 2))
        else:
            assert len(tries) == 1


def test_the_search_is_around_the_rate_of_the_preset():
    for name in ("best", "smallest"):
        assert NAMED[name].rate("2-2-8") == NAMED[name].rates("2-2-8")[1] == PRESETS[name]["distill"]["muon_lr"]
        assert max(NAMED[name].rates("8-8-8")) < PRESETS[name]["distill"]["muon_lr"]


def test_learned_scales_move_alike_in_presets_and_published_rows(base):
    def rates(bits):
        runs = {row.name: bench_run(base, row, bits, TRIED, 0) for row in ROWS if row.offered_at(bits)}
        return {name: one.config["distill"].get("gamma_lr", 1e-3) for name, one in runs.items()}

    narrow = rates("2-2-8")
    assert {name for name, rate in narrow.items() if rate == PRESETS["best"]["distill"]["gamma_lr"]} == {
        WITHOUT_CONTRAST,
        *WITH_CONTRAST.values(),
        REFERENCE,
        "quantgpt, per_channel",
        "lsq, per_tensor",
        "lsq, per_channel",
        "lsq_symmetric, per_channel",
        "seq, per_channel",
        "best",
        SMALLEST,
    }
    assert narrow[PAPER] == 1e-3  # the paper's own
    assert set(rates("4-4-8").values()) == set(rates("8-8-8").values()) == {1e-3}
