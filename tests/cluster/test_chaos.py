"""A model that is compressed while machines, workers and S3 fail is the model that it is where nothing does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.bench.chaos import measure as bench
from jobs.bench.chaos.command import Progress, Resumed
from jobs.bench.chaos.storm import FIRST

pytestmark = pytest.mark.timeout(2400)
RUN: dict[str, Any] = {"digest": "a", "again": [], "undisturbed": {"digest": "a"}}


def test_a_storm_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    document = bench.measure(20, 0, tmp_path, Console())
    assert set(FIRST) <= set(document["strikes"])
    assert len(document["strikes"]) >= 11
    assert {strike["strike"] for strike in document["stages"]} >= set(FIRST)
    again = [again for run in document["runs"] for again in run["again"]]
    assert any(one["stage"] == "distill" and one["resumed"] > 0 for one in again)
    assert sum(document["strikes"].values()) >= 20
    assert [run["digest"] for run in document["runs"]] == [run["undisturbed"]["digest"] for run in document["runs"]]
    assert document["left"] == []
    assert any(run["commands"] > 1 for run in document["runs"])
    assert json.loads((tmp_path / "chaos.json").read_text()) == document


@pytest.mark.parametrize(
    ("changed", "flaw"),
    [
        ({"runs": [RUN | {"digest": "b"}]}, "The package of seed 0 is b, and undisturbed a."),
        (
            {"runs": [RUN | {"again": [Resumed("distill", 90, 30, 60)._asdict()]}]},
            "distill went on from step 30, and a checkpoint had step 60.",
        ),
        ({"left": ["cache/1/rows/2.arrow"]}, "After gc the stores differ by cache/1/rows/2.arrow."),
    ],
)
def test_what_must_not_be_is_told(changed: dict[str, Any], flaw: str) -> None:
    sound = {"runs": [RUN | {"again": [Resumed("distill", 90, 60, 60)._asdict()]}], "left": []}
    assert bench._flaws(sound) == []
    assert bench._flaws(sound | changed) == [flaw]


def test_a_log_tells_what_was_trained_again() -> None:
    progress = Progress(newest={"distill": 30})
    told = [("finetune", 0, True), ("finetune", 50, False), ("distill", 0, True), ("distill", 45, False)]
    for stage, step, begins in [*told, ("distill", 31, True), ("distill", 60, False)]:
        point = {"step": step, "begins": 1.0} if begins else {"step": step}
        progress.hear(json.dumps({"event": "measured", "stage": stage, **point}))
    progress.hear(json.dumps({"event": "advanced", "stage": "distill", "done": 70}))
    progress.hear('{"event": "advanced", "sta')
    progress.hear("a line of a library")
    assert progress.again == [Resumed("distill", 45, 31, 30)]
    assert progress.reached == {"finetune": 50, "distill": 70}
    assert progress.heard == len(told) + 3
    assert progress.stage == "distill"
