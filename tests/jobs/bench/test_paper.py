"""The paper's cells as the specification has them, and configurations that stand for its rows."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import jobs
from jobs.bench import paper
from jobs.bench.paper import TABLES, Cell, beside, rows_of
from jobs.bench.trials import trial
from jobs.cli import app
from pipeline.config import Config
from pipeline.loading import load_config

ROOT = Path(jobs.__file__).parents[1]
# method.md, section 8, mark by mark: (s) seen in a public source; what has no mark is recalled.
TABLE_1 = {
    ("full precision", "32"): "14.48 s, 14.72, 14.19, 77.01 s",
    ("quantgpt", "8-8-8"): "15.31 s, 14.90 s, 14.58 s, 76.12",
    ("quantgpt", "4-4-8"): "15.55, 14.95, 15.31, 76.57 s",
    ("quantgpt", "2-2-8"): "17.30 s, 16.12, 16.98 s, 74.78 s",
    ("pact", "8-8-8"): "17.49 s, 16.11, 16.76 s, 74.73",
    ("pact", "4-4-8"): "19.23, 20.17, 20.15, 25.13",
    ("pact", "2-2-8"): "173.02, 189.13, 171.03, 5.52 s",
    ("lsq", "8-8-8"): "16.75, 15.43, 15.24, 75.28",
    ("lsq", "4-4-8"): "78.99, 79.76, 75.12, 45.10",
    ("lsq", "2-2-8"): "847.54, 544.98, 1470.86, 5.54 s",
    ("laq", "8-8-8"): "16.91 s, 15.87 s, 15.88 s, 76.02 s",
    ("laq", "4-4-8"): "17.12, 16.55, 16.91, 71.17",
    ("laq", "2-2-8"): "19.15, 18.25, 18.97, 71.36",
}
TABLE_3 = {
    ("full precision", "32"): (40.75, 18.10, 33.05),
    ("quantgpt", "8-8-8"): (40.25, 17.78, 32.70),
    ("quantgpt", "4-4-8"): (40.24, 17.71, 32.69),
    ("quantgpt", "2-2-8"): (39.15, 16.72, 31.72),
}


def test_the_values_are_the_papers():
    found = {key: [cell.value for cell in cells] for key, cells in TABLES["1"].cells.items()}
    assert found == {key: [float(cell.split()[0]) for cell in text.split(", ")] for key, text in TABLE_1.items()}
    assert {key: tuple(c.value for c in cells) for key, cells in TABLES["3"].cells.items()} == TABLE_3


@pytest.mark.parametrize("key", TABLE_1, ids=" ".join)
def test_no_cell_claims_more_than_was_seen(key):
    marks = [cell.endswith(" s") for cell in TABLE_1[key].split(", ")]
    assert [cell.seen for cell in TABLES["1"].cells[key]] == marks


def test_a_cell_shows_its_mark():
    assert (str(Cell(14.48, True)), str(Cell(16.12)), str(Cell(1470.86, True))) == (
        "14.48 (s)",
        "16.12 (r)",
        "1470.86 (s)",
    )


@pytest.mark.parametrize("number", TABLES)
def test_every_configuration_is_there_and_becomes_the_papers_recipe(number):
    table = TABLES[number]
    assert len(next(iter(table.cells.values()))) == len(table.columns)
    for path in (table.tiny, *table.full):
        for bits in paper.WIDTHS:
            config = load_config(ROOT / path, ["preset=paper", f"quant.bits={bits}"])
            assert (config.quant.quantizer, config.quant.granularity, config.quant.gamma_init) == (
                "quantgpt",
                "tensor",
                "one",
            )
            assert (config.distill.contrast_weight, config.distill.gamma_lr) == (0.1, 1e-3)
    assert len(table.full) == (4 if number == "1" else 1)


@pytest.mark.parametrize("number", TABLES)
def test_every_row_is_a_recipe_at_its_width(number):
    table = TABLES[number]
    base, rows = load_config(ROOT / table.tiny), rows_of(TABLES[number])
    for method, bits in table.cells:
        if method == paper.FULL:
            continue
        config = Config.model_validate(trial(base, rows[method], bits, 1e-3, 0).config)
        assert (config.quant.quantizer, config.quant.granularity, config.quant.bits) == (method, "tensor", bits)
        assert (config.distill.contrast_weight > 0) == (method == "quantgpt")


@pytest.mark.parametrize("number", TABLES)
def test_the_full_scale_says_what_it_takes(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = CliRunner().invoke(app, ["bench", "paper", "--table", number, "--scale", "full", "--json"])
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert len(document["commands"]) == 3 * len(TABLES[number].full)
    for command in document["commands"]:
        program, verb, path, *options = shlex.split(command)
        assert (program, verb) == ("bitmill", "compress")
        assert command in shown.stderr
        assert (ROOT / path).is_file()
        assert options[:2] == ["--set", "preset=paper"]
    assert "GPU" in document["needs"]


@pytest.mark.parametrize(("option", "value"), [("--table", "2"), ("--table", "one"), ("--scale", "huge")])
def test_a_table_or_scale_that_is_none_is_refused(option, value):
    shown = CliRunner().invoke(app, ["bench", "paper", option, value, "--json"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert repr(value) in shown.stderr
    assert all(part in shown.stderr for part in ("--table", "--scale", "1 or 3", "tiny or full"))


def test_the_table_stands_beside_ours(finished, tiny_config, cloned, monkeypatch):
    few = {key: cells for key, cells in TABLES["1"].cells.items() if key[1] in ("32", "2-2-8") and key[0] != "laq"}
    monkeypatch.setitem(TABLES, "1", replace(TABLES["1"], cells=few))
    console = Console(file=StringIO(), width=250)
    document = beside("1", tiny_config(cloned, distill={"steps": 2}), console)
    assert [(row["method"], row["bits"]) for row in document["rows"]] == [*few, (paper.ROUNDING, "2-2-8")]
    for row in document["rows"]:
        assert list(row["paper"]) == ([] if row["method"] == paper.ROUNDING else list(TABLES["1"].columns))
        assert row["ours"]["perplexity"] > 1
    ours = [row["ours"]["perplexity"] for row in document["rows"]]
    assert ours[0] == pytest.approx(finished.record("evaluate").teacher["perplexity"])
    assert len(set(ours)) == 5
    shown = console.file.getvalue()
    for row, number in zip(document["rows"], ours, strict=True):
        (line,) = [line for line in shown.splitlines() if row["method"] in line and row["bits"] in line]
        assert f"{number:.2f}" in line
        for cell in row["paper"].values():
            assert f"{cell['value']:g} ({'s' if cell['seen'] else 'r'})" in line
