"""A preset fills what a file leaves open, and is nothing but the values it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.laid_over import laid_over
from pipeline.config.load import load_config
from pipeline.config.presets import PRESETS, filled, set_otherwise
from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.config.training import Distill
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run
from pipeline.package.package import load
from tests.conftest import Ran

MINIMAL: dict[str, Any] = {"name": "tiny", "model": {"source": "a/b"}, "data": {"source": "*.txt"}}
THE_PAPERS: dict[str, dict[str, Any]] = {
    "quant": {"quantizer": "quantgpt", "granularity": "per_tensor", "gamma_init": "one"},
    "distill": {"gamma_lr": 1e-3, "contrast_weight": 0.1, "temperature": 0.1, "negatives": 64, "momentum": 0.5},
}
every_preset = pytest.mark.parametrize("preset", sorted(PRESETS))


def config(**sections: Any) -> Config:
    return Config.model_validate({**MINIMAL, "distill": {"steps": 3}, **sections})


def values_of(found: Config, preset: str) -> dict[str, dict[str, Any]]:
    return {
        section: {name: getattr(getattr(found, section), name) for name in values}
        for section, values in PRESETS[preset].items()
    }


def test_the_paper_is_the_papers() -> None:
    assert PRESETS["paper"] == THE_PAPERS
    assert set(PRESETS) == {"paper", "best", "smallest"}
    assert PRESETS["smallest"]["pack"] == {"encoding": "base3"}


@every_preset
def test_a_preset_fills_what_the_file_leaves_open(preset: str) -> None:
    found = config(preset=preset)
    assert values_of(found, preset) == PRESETS[preset]
    assert found.distill.steps == 3
    untouched = config()
    for section in ("model", "task", "data", "cache", "evaluate", "resources"):
        assert getattr(found, section) == getattr(untouched, section)


@pytest.mark.parametrize(
    ("bits", "rates"),
    [("2-2-8", (0.03, 2e-2)), ("2-4-8", (0.03, 2e-2)), ("4-4-8", (0.004, 1e-3)), ("8-8-8", (0.004, 1e-3))],
)
def test_above_two_bits_a_preset_moves_less(bits: str, rates: tuple[float, float]) -> None:
    found = config(preset="best", quant={"bits": bits}).distill
    assert (found.muon_lr, found.gamma_lr) == rates
    own = config(preset="best", quant={"bits": bits}, distill={"steps": 3, "gamma_lr": 7e-3}).distill
    assert (own.muon_lr, own.gamma_lr) == (rates[0], 7e-3)
    paper = config(preset="paper", quant={"bits": bits}).distill
    assert paper.gamma_lr == 1e-3


@pytest.mark.parametrize(
    ("task", "negatives"),
    [({}, 64), ({"name": "language_modeling"}, 64), ({"name": "summarization"}, 32), ({"name": "next_utterance"}, 32)],
)
def test_the_paper_has_fewer_negatives_for_its_other_tasks(task: dict[str, Any], negatives: int) -> None:
    assert config(preset="paper", task=task).distill.negatives == negatives
    assert config(preset="paper", task=task, distill={"steps": 3, "negatives": 7}).distill.negatives == 7


@pytest.mark.parametrize("quantizer", ["twn", "statistics", "laq_uniform", "lsq", "pact", "quantgpt"])
def test_values_that_another_quantizer_does_not_take_are_left_out(quantizer: str) -> None:
    assert config(preset="best", quant={"quantizer": quantizer}).quant.quantizer == quantizer


def test_values_that_another_optimizer_does_not_take_are_left_out() -> None:
    found = config(preset="best", distill={"steps": 3, "optimizer": "adam"}).distill
    assert (found.optimizer, found.muon_lr, found.schedule) == ("adam", Distill(steps=3).muon_lr, "cosine")


@every_preset
def test_what_was_trained_to_be_quantized_is_not_faded_in(preset: Any) -> None:
    on = config(preset=preset, distill={"steps": 3, "start": "tiny@champion"})
    rest = {name: value for name, value in PRESETS[preset]["distill"].items() if name != "fade_in"}
    assert on.distill == Distill(**{"steps": 3, "start": "tiny@champion", **rest})
    assert set_otherwise(on.model_dump(), preset) == {}
    assert laid_over(config(preset=preset), {"distill.start": "tiny@champion"}) == on


@every_preset
def test_what_the_file_sets_wins(preset: str) -> None:
    found = config(
        preset=preset,
        quant={"granularity": "per_channel", "bits": "2-2-32"},
        distill={"steps": 4, "contrast_weight": 0.7},
    )
    assert (found.quant.granularity, found.quant.bits) == ("per_channel", "2-2-32")
    assert (found.distill.contrast_weight, found.distill.steps) == (0.7, 4)
    assert found.quant.gamma_init == PRESETS[preset]["quant"]["gamma_init"]
    assert config(preset="smallest", pack={"encoding": "dense"}).pack.encoding == "dense"


@every_preset
def test_what_the_file_sets_otherwise_is_told(preset: Any) -> None:
    assert set_otherwise(config(preset=preset).model_dump(), preset) == {}
    assert set_otherwise(config(preset=preset, task={"name": "summarization"}).model_dump(), preset) == {}
    found = config(preset=preset, distill={"steps": 3, "gamma_lr": 0.7}, quant={"quantizer": "twn"}).model_dump()
    own = PRESETS[preset]
    assert set_otherwise(found, preset) == {
        "quant.quantizer": ("twn", own["quant"]["quantizer"]),
        "distill.gamma_lr": (0.7, own["distill"]["gamma_lr"]),
    }


@every_preset
def test_filling_leaves_the_fields_and_the_preset_as_they_were(preset: Any) -> None:
    fields: dict[str, Any] = {"quant": {"bits": "2-2-8"}, "distill": {"steps": 3}}
    before = {name: dict(values) for name, values in PRESETS[preset].items()}
    result = filled(fields, preset)
    result["quant"]["bits"] = "8-8-8"
    assert fields == {"quant": {"bits": "2-2-8"}, "distill": {"steps": 3}}
    assert PRESETS[preset] == before


@every_preset
def test_a_dumped_configuration_is_read_back_as_it_is(preset: str) -> None:
    found = config(preset=preset, distill={"steps": 3, "contrast_weight": 0.3})
    assert Config.model_validate(found.model_dump(mode="json", by_alias=True)) == found


@pytest.mark.parametrize("preset", ["worst", "Paper", 7, ["best"], {"best": 1}], ids=str)
def test_an_unknown_preset_is_refused_by_name_with_the_valid_ones(preset: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "distill": {"steps": 3}, "preset": preset}))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (line,) = [line for line in str(raised.value).splitlines() if line.startswith("  preset")]
    assert all(name in line for name in ("'paper'", "'best'", "'smallest'"))
    assert repr(preset) in line


def test_set_gives_a_preset_and_changes_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "distill": {"steps": 3}}))
    found = load_config(path, ["preset=best", "distill.contrast_weight=0.2"])
    assert found.quant.quantizer == PRESETS["best"]["quant"]["quantizer"]
    assert found.distill.contrast_weight == 0.2


def test_the_smallest_is_ternary() -> None:
    with pytest.raises(ValueError, match=r"base3 holds ternary codes only; quant\.bits is 4-4-8"):
        config(preset="smallest", quant={"bits": "4-4-8"})
    assert config(preset="smallest", quant={"bits": "4-4-8"}, pack={"encoding": "dense"}).quant.bits == "4-4-8"


Make = Callable[..., Config]


def keys(config: Config) -> list[str]:
    return [step.dir.key for step in plan_run(config).steps]


@every_preset
def test_a_preset_has_the_keys_of_its_values_written_out(tiny_config: Make, preset: Any, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, preset=preset)
    values = {section: dict(values) for section, values in PRESETS[preset].items()}
    values["distill"].pop("lr", None)  # which the file sets itself
    written = keys(tiny_config(tmp_path, **values))
    assert keys(config) == written
    changed = keys(tiny_config(tmp_path, preset=preset, quant={"gamma_init": "auto"}))
    assert (changed[:3], changed[3] == written[3]) == (written[:3], False)


@every_preset
def test_a_preset_goes_through_the_line(
    tiny_config: Make, run_flow: Callable[..., Ran], preset: str, cloned: Path
) -> None:
    ran = run_flow(tiny_config(cloned, preset=preset, distill={"steps": 3}), until="pack")
    assert list(ran.outcome.status.values()) == ["reused"] * 3 + ["done"] * 3
    recipe = ran.record("distill").recipe
    for section, kind in (("quant", Quant), ("distill", Distill)):
        trained = kind.model_validate(recipe[section])
        values = {name: value for name, value in PRESETS[preset][section].items() if name != "lr"}
        assert {name: getattr(trained, name) for name in values} == values
    assert load(ran.package).config.model_type == "gpt2"
    scored = ran.record("evaluate")
    assert scored.student["perplexity"] < 1.5 * scored.teacher["perplexity"]
    if preset == "smallest":
        assert ran.record("pack").recipe["encoding"] == "base3"
        dense = run_flow(
            tiny_config(cloned, preset=preset, distill={"steps": 3}, pack={"encoding": "dense"}), until="pack"
        )
        assert ran.record("pack").size.packed_bytes < dense.record("pack").size.packed_bytes
