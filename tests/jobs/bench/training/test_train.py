"""`bench train` on a small GPT-2: what is counted, what floors are of, and what becomes of a row that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.bench.training import steps, train
from jobs.cli import app

TEACHER = "cache, of the bare forward"
SMALL = ("--layers", "2", "--width", "32", "--heads", "2", "--vocab", "64", "--length", "16", "--batch", "8")


def bench(out: Path, *arguments: str) -> Any:
    common = ("--rounds", "1", "--device", "cpu", "--out", str(out), "--json")
    return CliRunner().invoke(app, ["bench", "train", *SMALL, *common, *arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    out = tmp_path_factory.mktemp("bench")
    names = (steps.CACHED, steps.IN_PARTS, steps.BEST_CACHED, steps.BEST_ONLINE, "finetune")
    chosen = [argument for name in names for argument in ("--only", name)]
    shown = bench(out, *chosen, "--profile")
    assert shown.exit_code == 0, shown.stderr
    return json.loads(shown.stdout), out, shown.stderr


def test_every_row_is_measured_beside_plain_transformers(measured: Any) -> None:
    document, out, said = measured
    assert document == json.loads((out / "train.json").read_text())
    assert list(document["rows"]) == [
        *(steps.PLAIN, steps.CACHED, steps.IN_PARTS, steps.BEST_CACHED, steps.BEST_ONLINE),
        "finetune",
    ]
    assert document["failed"] == {}
    assert said.index("best, online ...") < said.index("best, online: ")  # while it goes on, and once it has ended
    for row in document["rows"].values():
        assert row["peak_bytes"] > 0
        assert row["ms"]["least"] <= row["ms"]["median"] <= row["ms"]["most"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * 8 * 16 / row["ms"]["median"])


def test_operations_are_counted_not_timed(measured: Any) -> None:
    rows = measured[0]["rows"]
    launches = {name: row["launches"] for name, row in rows.items()}
    # A batch in parts takes a forward and a backward pass for each, and one optimizer's step for all.
    assert 2 * launches[steps.CACHED] < launches[steps.IN_PARTS] < 4 * launches[steps.CACHED]
    assert launches[steps.BEST_CACHED] < launches[steps.BEST_ONLINE]  # which runs the teacher
    assert launches["finetune"] < launches[steps.PLAIN] < 2 * launches["finetune"]  # whose GELU is one operation


def test_ratios_have_the_names_that_floors_are_of(measured: Any) -> None:
    ratios = measured[0]["ratios"]
    rows = measured[0]["rows"]
    assert ratios[f"launches: {steps.CACHED}"] == rows[steps.CACHED]["launches"] / rows[steps.PLAIN]["launches"]
    assert {f"step: {steps.BEST_CACHED}", f"memory: {steps.BEST_CACHED}", "cache, of the bare forward"} <= set(ratios)
    assert ratios[f"step before its optimizer: {steps.BEST_CACHED}"] > 0
    assert {"micro_batch a quarter, of the whole", "cached of what it could be: best"} <= set(ratios)


def test_the_page_and_the_profiles_lie_beside_the_numbers(measured: Any) -> None:
    _, out, _ = measured
    page = (out / "train.md").read_text()
    assert "8 rows of 16 tokens" in page
    assert "a checkpoint" in page
    assert page.count("| best, cached |") == 1
    assert "aten::" in (out / "profile-best-cached.txt").read_text()


def test_committed_floors_are_of_ratios_that_there_are() -> None:
    floors = json.loads(train.FLOORS.read_text())
    assert set(floors) == {"cpu", "H100", "H200"}
    rows = {
        name: {
            "of_baseline": {"median": 1.0},
            "ms": {"median": 1.0},
            "optimizer_ms": 0.1,
            "launches": 1,
            "peak_bytes": 1,
        }
        for name in steps.ROWS
    }
    teacher = {"cache_tokens_per_s": 1.0, "forward_tokens_per_s": 1.0, "forward_ms": 0.1}
    beside = {name: {measure: 1.0} for name, measure, _ in train.RATIOS_BESIDE}
    names = train.ratios({"rows": rows, "baseline": steps.PLAIN, "teacher": teacher, **beside})
    for bounds in floors.values():
        assert set(bounds) == {"at_most", "at_least"}
        assert {name for limits in bounds.values() for name in limits} <= set(names)
    assert {ratio for _, measure, ratio in train.RATIOS_BESIDE if measure != "of_fp32_avx2"} <= {
        name for limits in floors["cpu"].values() for name in limits
    }
    for name in names:
        assert train.rows_of(name) <= {*steps.ROWS, *train.BESIDE}


def test_only_ratios_of_rows_that_were_chosen_have_to_be_measured() -> None:
    """One of two rows is checked where both were chosen; that of the teacher always, who always is measured."""
    paper, online = f"step: {steps.CACHED}", "cached of what it could be: paper"
    floors = {"at_most": {paper: 1.3}, "at_least": {online: 0.95, "pack, of the least": 0.5, TEACHER: 0.85}}

    def missed(*only: str) -> list[str]:
        document = {"ratios": {TEACHER: 0.9}, "failed": {}, "extent": {"only": list(only)}}
        return [line.partition(" was not measured")[0] for line in train.shortfalls(document, floors)]

    assert missed() == [paper, online, "pack, of the least"]
    assert missed(steps.CACHED) == [paper]
    assert missed(steps.CACHED, steps.ONLINE) == [paper, online]
    assert missed("pack") == ["pack, of the least"]
    assert missed("finetune") == []


def test_a_ratio_that_misses_its_bound_or_was_not_measured_is_named() -> None:
    floors = {"at_most": {"step": 1.3}, "at_least": {"cache": 0.85}}
    document: dict[str, Any] = {"ratios": {"step": 1.31, "cache": 0.85}, "failed": {}, "extent": {"only": []}}
    assert train.shortfalls(document, floors) == ["step is 1.310, and must be at most 1.3"]
    document["ratios"] = {"step": 1.3, "cache": 0.84}
    assert train.shortfalls(document, floors) == ["cache is 0.840, and must be at least 0.85"]
    document["ratios"] = {"step": 1.3}
    assert train.shortfalls(document, floors) == ["cache was not measured, and must be at least 0.85"]


def test_a_device_without_floors_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floors = tmp_path / "floors.json"
    floors.write_text(json.dumps({"H100": {"at_most": {}, "at_least": {}}}))
    monkeypatch.setattr(train, "FLOORS", floors)
    shown = bench(tmp_path / "out", "--check")
    assert shown.exit_code == 2
    assert "no floors for 'cpu'; it has some for H100" in " ".join(shown.stderr.split())
    assert not (tmp_path / "out").exists()


def test_check_ends_with_status_1_and_what_fell_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = tmp_path / "floors.json"
    bounds = {"launches: finetune": 0.5, "step: best, cached": 0.5}
    floors.write_text(json.dumps({"cpu": {"at_most": bounds, "at_least": {}}}))
    monkeypatch.setattr(train, "FLOORS", floors)
    shown = bench(tmp_path / "out", "--only", "finetune", "--check")
    assert shown.exit_code == 1
    assert "launches: finetune is" in " ".join(shown.stderr.split())
    assert "must be at most 0.5" in " ".join(shown.stderr.split())
    assert "best, cached" not in shown.stderr  # which was not chosen


def test_a_row_that_fails_is_named_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(made: steps.Steps) -> steps.Case:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(steps.ROWS, steps.CACHED, fails)
    shown = bench(tmp_path, "--only", steps.CACHED, "--only", "finetune")
    assert shown.exit_code == 1
    assert "paper, cached failed: RuntimeError: out of memory" in shown.stderr
    document = json.loads((tmp_path / "train.json").read_text())
    assert document["failed"] == {steps.CACHED: "RuntimeError: out of memory"}
    assert list(document["rows"]) == [steps.PLAIN, "finetune"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "worst"), "--only 'worst' is no row of this bench; valid: transformers; "),
        (("--heads", "3"), "--heads 3 does not divide --width 32"),
        (("--device", "tpu"), "--device is 'tpu'; valid: auto, cuda, cpu"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    shown = bench(tmp_path, *arguments)
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.split())


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shown = bench(tmp_path, "--device", "cuda")
    assert shown.exit_code == 2
    assert "torch sees no GPU here" in " ".join(shown.stderr.split())
