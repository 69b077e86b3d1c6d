"""`make demo-retrain` gives commands that there are, in an order that shows what a schedule does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from jobs.cli import app
from jobs.schedule import demo
from pipeline.tracking import runs
from tests.conftest import ROOT

DECISIONS = ["promoted", "promoted", "rejected", "unchanged"]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demonstration gives, each read by the command line and not run; ticks decide as is due."""
    commands: list[list[str]] = []
    decisions, group = iter(DECISIONS), typer.main.get_command(app)

    def read(arguments: str) -> str:
        name, *rest = words = shlex.split(arguments)
        group.commands[name].make_context(name, list(rest))  # type: ignore[attr-defined]
        commands.append(words)
        return json.dumps({"decision": next(decisions)} if name == "retrain" else {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "bitmill", read)
    monkeypatch.setattr(demo, "packaged_texts", lambda name: (f"{name} {number}" for number in range(4000)))
    return commands


def test_it_may_be_given_again(given: list[list[str]], tmp_path: Path) -> None:
    for left in ("text/slice-9.jsonl", "store/mlflow.db"):
        path = tmp_path / "bitmill-demo" / left
        path.parent.mkdir(parents=True)
        path.write_text("of an earlier one")
    demo.main()
    assert not (tmp_path / "bitmill-demo" / "store").exists()  # before the commands make one
    assert len([*(tmp_path / "bitmill-demo" / "text").iterdir()]) == 4


def test_it_ends_with_a_rollback_and_the_lineage_of_both_versions(given: list[list[str]], tmp_path: Path) -> None:
    demo.main()
    assert [words[0] for words in given] == ["retrain"] * 4 + ["rollback", "history", "lineage", "lineage"]
    assert [words[1] for words in given[-2:]] == ["retrain-chitchat@champion", "retrain-chitchat@previous"]
    slices = sorted((tmp_path / "bitmill-demo" / "text").iterdir())
    assert [len(path.read_text().splitlines()) for path in slices] == [demo.SLICE] * 4
    assert json.loads(slices[3].read_text().splitlines()[0]) == {"text": f"chitchat {3 * demo.SLICE}"}


def test_it_stops_where_a_tick_decides_otherwise(given: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "bitmill", lambda arguments: json.dumps({"decision": "rejected", "reason": "too small"}))
    with pytest.raises(SystemExit, match="was to be promoted, and was rejected: too small"):
        demo.main()


def test_it_stops_where_a_tick_without_new_data_takes_too_long(
    given: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, demo.UNCHANGED_S))  # each tick takes as long as this one may not
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(SystemExit, match=r"was to take less than 5 s, and took 5\.0 s"):
        demo.main()
    assert [words[0] for words in given] == ["retrain"] * 4


def test_it_has_a_store_and_a_registry_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://mine")
    monkeypatch.chdir(tmp_path)
    runs.client_of(f"sqlite:///{tmp_path}/bitmill-demo/store/mlflow.db")  # makes it
    assert json.loads(demo.bitmill(f"gc --plan --json {demo.STORE}"))["garbage"] == []
