"""How many weights share a scale: what a configuration may say, and what is refused before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_fields
from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run, reasons
from pipeline.quant.granularity import GROUP_SIZES, Granularity
from pipeline.store.keys import canonical_json, recipe_of

# Rows of 64 weights, but for the second matrix of each MLP, whose rows have 96
UNEVEN = {"architecture": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 40, "n_inner": 96}


def read(granularity: Any) -> Config:
    fields = {"name": "n", "model": {"source": "a/b"}, "data": {"source": "*.txt"}, "distill": {"steps": 3}}
    return load_fields({**fields, "quant": {"granularity": granularity}}, None, None, "config.yaml")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", *({"per_group": size} for size in GROUP_SIZES)])
def test_every_granularity_is_taken_as_it_is_written(granularity: str | dict[str, int]) -> None:
    quant = read(granularity).quant
    assert quant.spec().granularity == Granularity.parse(granularity)
    assert quant.spec().granularity.written() == granularity
    assert Quant.model_validate_json(quant.model_dump_json()) == quant
    assert recipe_of(quant)["granularity"] == granularity


def test_groups_of_64_are_groups_of_64() -> None:
    assert read({"per_group": 64}).quant.spec().granularity == Granularity("per_group", 64)


def test_each_granularity_has_a_key_of_its_own() -> None:
    kinds = ["per_tensor", "per_channel", *({"per_group": size} for size in GROUP_SIZES)]
    assert len({canonical_json(recipe_of(read(kind).quant)) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("size", [48, 0, -32, 16, 256, 32.5, None, "many"])
def test_another_group_size_is_refused_with_the_valid_ones(size: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        read({"per_group": size})
    (line,) = [line for line in str(raised.value).splitlines() if "per_group:" in line]
    assert "quant.granularity" in line
    assert "32, 64 or 128" in line
    assert repr(size) in line


@pytest.mark.parametrize("granularity", ["row", "tensor", "per_group", "", 64, ["per_group", 64]], ids=str)
def test_what_is_no_granularity_is_refused_with_those_there_are(granularity: Any) -> None:
    with pytest.raises(ConfigError, match=r"quant\.granularity.*'per_tensor' or 'per_channel'"):
        read(granularity)


def test_more_than_a_group_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows: unknown key\."):
        read({"per_group": 64, "rows": 2})


Make = Callable[..., Config]


def test_rows_that_are_no_whole_groups_are_refused_before_anything_runs(tiny_config: Make, tmp_path: Path) -> None:
    model = {"source": UNEVEN, "tokenizer": {"train_bpe": 300}}
    with pytest.raises(ConfigError) as raised:
        plan_run(tiny_config(tmp_path, model=model, quant={"granularity": {"per_group": 64}}))
    assert re.search(
        r"quant\.granularity is per_group 64, and the rows of transformer\.h\.0\.mlp\.c_proj have 96 weights",
        str(raised.value),
    )
    assert not (tmp_path / "store").exists()
    plan = plan_run(tiny_config(tmp_path, model=model, quant={"granularity": {"per_group": 32}}))
    assert reasons(plan)["distill"].startswith("follows")
