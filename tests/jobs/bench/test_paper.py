"""The paper's cells as the specification has them, and configurations that stand for its rows."""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import jobs
from jobs.bench import paper
from jobs.bench.paper import TABLES, Cell, Tiny, beside, rows_of
from jobs.bench.rows import PAPER, Try, named
from jobs.bench.students import bench_run
from jobs.cli import app
from pipeline.config.load import load_config
from pipeline.config.presets import RATIO_LR
from pipeline.config.run import Config

ROOT = Path(jobs.__file__).parents[1]
# Mark by mark: s, seen in a public source; what has no mark is recalled; -: the paper has none.
TABLE_1 = {
    ("full precision", "32"): "474.9, 14.48 s, 14.72, 14.19, 77.01 s",
    ("quantgpt", "8-8-8"): "121.4, 15.31 s, 14.90 s, 14.58 s, 76.12",
    ("quantgpt", "4-4-8"): "62.4, 15.55, 14.95, 15.31, 76.57 s",
    ("quantgpt", "2-2-8"): "33.0 s, 17.30 s, 16.12, 16.98 s, 74.78 s",
    ("pact", "8-8-8"): "-, 17.49 s, 16.11, 16.76 s, 74.73",
    ("pact", "4-4-8"): "-, 19.23, 20.17, 20.15, 25.13",
    ("pact", "2-2-8"): "-, 173.02, 189.13, 171.03, 5.52 s",
    ("lsq", "8-8-8"): "-, 16.75, 15.43, 15.24, 75.28",
    ("lsq", "4-4-8"): "-, 78.99, 79.76, 75.12, 45.10",
    ("lsq", "2-2-8"): "-, 847.54, 544.98, 1470.86, 5.54 s",
    ("laq", "8-8-8"): "-, 16.91 s, 15.87 s, 15.88 s, 76.02 s",
    ("laq", "4-4-8"): "-, 17.12, 16.55, 16.91, 71.17",
    ("laq", "2-2-8"): "-, 19.15, 18.25, 18.97, 71.36",
}
TABLE_3 = {
    ("full precision", "32"): "532.0 s, 40.75, 18.10, 33.05",
    ("quantgpt", "8-8-8"): "138.1 s, 40.25, 17.78, 32.70",
    ("quantgpt", "4-4-8"): "72.4, 40.24, 17.71, 32.69",
    ("quantgpt", "2-2-8"): "39.6 s, 39.15, 16.72, 31.72",
}


@pytest.mark.parametrize(("number", "known"), [("1", TABLE_1), ("3", TABLE_3)])
def test_the_values_are_the_papers_and_no_cell_claims_more_than_was_seen(number, known):
    found = {
        key: [None if math.isnan(c.value) else (c.value, c.seen) for c in cells]
        for key, cells in TABLES[number].cells.items()
    }
    assert found == {
        key: [None if c == "-" else (float(c.split()[0]), c.endswith(" s")) for c in text.split(", ")]
        for key, text in known.items()
    }


def test_a_cell_shows_its_mark():
    assert (str(Cell(14.48, True)), str(Cell(16.12)), str(Cell(1470.86, True))) == (
        "14.48 (s)",
        "16.12 (r)",
        "1470.86 (s)",
    )
    assert str(paper.NOT_GIVEN) == ""


@pytest.mark.parametrize("number", TABLES)
def test_every_row_is_a_recipe_at_its_width(number):
    table = TABLES[number]
    assert len(next(iter(table.cells.values()))) == len(table.columns)
    for tiny in table.tiny:
        base = load_config(ROOT / tiny.config, list(tiny.overrides))
        rows = rows_of(table)
        for method, bits in table.cells:
            if method == paper.FULL:
                continue
            config = Config.model_validate(bench_run(base, rows[method], bits, rows[method].own_try(bits), 0).config)
            assert (config.quant.quantizer, config.quant.granularity, config.quant.bits) == (method, "per_tensor", bits)
            assert config.distill.contrast_weight == (0.1 if method == "quantgpt" else 0.0)
            assert config.quant.gamma_init == "auto"  # some hundred steps do not bring the paper's gamma home
            if method in ("quantgpt", "lsq"):
                assert config.distill.gamma_lr == (RATIO_LR if bits == "2-2-8" else 1e-3)
            if method == "quantgpt":
                assert config.distill.negatives == base.distill.negatives
    negatives = {
        t.config: load_config(ROOT / t.config).distill.negatives for t in (*TABLES["1"].tiny, *TABLES["3"].tiny)
    }
    assert list(negatives.values()) == [64, 32, 32]  # the paper's, for each task


@pytest.mark.parametrize("number", TABLES)
def test_the_full_scale_says_what_it_takes_and_its_commands_are_the_rows(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = TABLES[number]
    shown = CliRunner().invoke(app, ["bench", "paper", "--table", number, "--scale", "full", "--json"])
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    methods = [key for key in table.cells if key[0] != paper.FULL]
    assert len(document["commands"]) == len(methods) * len(table.full) == (48 if number == "1" else 3)
    for command, (full, (method, bits)) in zip(
        document["commands"], ((full, key) for full in table.full for key in methods), strict=True
    ):
        program, verb, path, *options = shlex.split(command)
        assert (program, verb, path) == ("bitmill", "compress", full.config)
        assert command in shown.stderr
        given = dict(zip(options[::2], options[1::2], strict=True))
        sets = [value for option, value in zip(options[::2], options[1::2], strict=True) if option == "--set"]
        assert given["--bits"] == bits
        sets += [f"preset={given['--preset']}"] if "--preset" in given else []
        config = load_config(ROOT / path, [*sets, f"quant.bits={bits}"])
        assert config.distill.negatives == (64 if config.task.name == "language_modeling" else 32)
        # At its own scale the paper's start and rate of gamma suit; the rows that train here have others.
        row = named(PAPER) if method == "quantgpt" else rows_of(table)[method]
        tried = Try(config.distill.lr, 0.1 if method == "quantgpt" else 0.0)
        same = Config.model_validate(bench_run(config, row, bits, tried, 0).config)
        assert config.quant == same.quant
        papers = {"negatives": config.distill.negatives, "gamma_lr": 1e-3}
        assert config.distill == same.distill.model_copy(update=papers)
        assert config.preset == "paper" or method != "quantgpt"
    for full in table.full:
        assert document["gpus"][full.config]["gpu_hours"] > 0.5
        assert f"{full.config}: {full.gpu_hours:.1f} GPU hours" in shown.stderr
        assert load_config(ROOT / full.config).resources.workers == full.gpus


def test_gpu_hours_are_operations_by_speed():
    # 6 x 124e6 parameters x 192e6 tokens = 1.428e17 operations, 14,285 s at 1e13 a second
    assert TABLES["1"].full[0].gpu_hours == pytest.approx(3.968, rel=1e-4)
    assert load_config(ROOT / "configs/gpt2-personachat.yaml").cache.mode == "online"
    assert TABLES["1"].full[3].operations == 8


@pytest.mark.parametrize(
    "override",
    ["quant.quantizer=seq", "distill.contrast_weight=0", "distill.gamma_lr=1", "preset=best", "pack.encoding=dense"],
)
def test_a_value_that_each_row_decides_is_refused(override):
    shown = CliRunner().invoke(app, ["bench", "paper", "--table", "3", "--set", override, "--json"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    path = override.partition("=")[0]
    assert f"--set {path} has no effect here" in " ".join(shown.stderr.split())
    assert all(f"distill.{knob}" in shown.stderr for knob in ("lr", "steps"))


@pytest.mark.parametrize(("option", "value"), [("--table", "2"), ("--table", "one"), ("--scale", "huge")])
def test_a_table_or_scale_that_is_none_is_refused(option, value):
    shown = CliRunner().invoke(app, ["bench", "paper", option, value, "--json"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert repr(value) in shown.stderr
    assert all(part in shown.stderr for part in ("--table", "--scale", "1 or 3", "tiny or full"))


@pytest.mark.parametrize("number", TABLES)
@pytest.mark.parametrize("width", [80, 120])
def test_what_is_printed_is_whole(number, width, tiny_config, tmp_path):
    """Where there is little room, figures are folded."""
    table, console = TABLES[number], Console(file=StringIO(), width=width)
    ours = [
        {key: {paper.MIB: 147.61} | dict.fromkeys(tiny.metrics, 128.13) for key in table.cells} for tiny in table.tiny
    ]
    paper._print(number, [tiny_config(tmp_path)] * len(ours), table.cells, ours, console)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for cells in table.cells.values() if width == 120 else ():
        assert all(f" {cell.value:g} " in shown for cell in cells if not math.isnan(cell.value))


def test_the_table_stands_beside_ours(finished, tiny_config, cloned, monkeypatch):
    few = {key: cells for key, cells in TABLES["1"].cells.items() if key[1] in ("32", "2-2-8") and key[0] != "laq"}
    stands_for = (Tiny("one", {"perplexity": 1}), Tiny("other", {"bits_per_byte": 100}))
    monkeypatch.setitem(TABLES, "1", replace(TABLES["1"], cells=few, tiny=stands_for))
    console = Console(file=StringIO(), width=250)
    bases = [tiny_config(cloned, distill={"steps": steps}, name=f"of-{steps}-steps") for steps in (2, 3)]
    document = beside("1", bases, console)
    assert document["configurations"] == ["one", "other"]
    assert all(day.endswith(platform.machine()) for day in document["measured"])
    assert len(document["measured"]) in (1, 2)  # midnight may pass
    assert document["steps"] == {"one": 2, "other": 3}
    assert document["rate"] == {"one": 2e-3, "other": 2e-3}
    assert [(row["method"], row["bits"]) for row in document["rows"]] == [*few, (paper.ROUNDING, "2-2-8")]
    shown = console.file.getvalue()
    assert " s] table: started" in shown  # and each student that follows
    assert re.search(r" s\] table: [1-9]\d*/", shown)
    for row in document["rows"]:
        cells = few.get((row["method"], row["bits"]), ())
        expected = {name: c for name, c in zip(TABLES["1"].columns, cells, strict=False) if not math.isnan(c.value)}
        assert row["paper"] == {name: {"value": c.value, "seen": c.seen} for name, c in expected.items()}
        begun = re.compile(rf" *{row['method']} +{row['bits']} ")
        (line,) = [line for line in shown.splitlines() if begun.match(line)]
        assert all(str(cell) in line for cell in expected.values())
        two, three = row["ours"]["one"], row["ours"]["other"]
        assert f"{two['perplexity']:.2f}" in line
        assert two[paper.MIB] == three[paper.MIB]
        if row["method"] != paper.FULL:
            assert f"{100 * three['bits_per_byte']:.2f}" in line
    whole = finished.record("evaluate").teacher["perplexity"]
    ours = [row["ours"]["one"] for row in document["rows"]]
    assert ours[0]["perplexity"] == pytest.approx(whole)
    assert ours[0][paper.MIB] == finished.record("finetune").fp32_bytes / 2**20
    assert len({found["perplexity"] for found in ours}) == 5
    assert all(found[paper.MIB] < ours[0][paper.MIB] / 3 for found in ours[1:])
