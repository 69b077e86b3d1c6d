"""The commands of a schedule as a person or cron gives them."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.schedule.retrain import _export_flaw
from pipeline.config.retrain import Retrain
from pipeline.errors import ConfigError, RunError, UnfitExportError
from pipeline.retrain.decisions import Decision, Decisions, now
from tests.conftest import ROOT
from tests.retrain.schedule import BETTER, NAME, Schedule

Command = Callable[..., Result]
HEAVY = {"ray", "optuna", "matplotlib", "scipy.stats", "transformers.modeling_utils"}


@pytest.fixture
def bitmill(undecided: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`bitmill("retrain", ...)` on the schedule with a better challenger that nothing was decided of; CONFIG stands for
    its configuration."""
    monkeypatch.setenv("BITMILL_STORAGE_URI", str(undecided.folder / "store"))
    monkeypatch.setenv("COLUMNS", "300")
    config = tmp_path / "tiny.yaml"
    told = tmp_path / "told.json"
    command = f"{sys.executable} -c \"import sys; open('{told}', 'w').write(sys.stdin.read())\""
    fields = undecided.config(BETTER, on_decision=command).model_dump(mode="json", by_alias=True, exclude_unset=True)
    config.write_text(yaml.safe_dump(fields))

    def call(*words: str) -> Result:
        return CliRunner().invoke(app, [str(config) if word == "CONFIG" else word for word in words])

    return call


def test_a_tick_tells_its_decision_and_is_unchanged_then(bitmill: Command, tmp_path: Path) -> None:
    planned = bitmill("retrain", "CONFIG", "--plan", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["champion"] == 1
    assert "challenger, " in planned.stderr
    done = bitmill("retrain", "CONFIG", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() == {"decision", "reason", "champion", "challenger", "details"}
    assert (document["decision"], document["champion"], document["challenger"]) == ("promoted", 2, 2)
    assert "decided by min_gain\n" in done.stderr
    assert document["details"]["decided_by"] == "min_gain"
    assert "passed" in done.stderr
    assert "champion version 2, previous version 1" in done.stderr
    assert json.loads((tmp_path / "told.json").read_text()) == document["details"]
    (tmp_path / "told.json").unlink()
    again = bitmill("retrain", "CONFIG", "--json")
    assert json.loads(again.stdout)["decision"] == "unchanged"
    assert not (tmp_path / "told.json").exists()
    assert "nothing to do: promoted" in bitmill("retrain", "CONFIG", "--plan").stderr
    code = f"""
import sys
from jobs.cli import app
app(["retrain", {str(tmp_path / "tiny.yaml")!r}, "--json"], standalone_mode=False)
print("heavy:", sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert json.loads(alone.stdout)["decision"] == "unchanged"
    assert "heavy: []" in alone.stderr  # which is what takes the time of such a tick


@pytest.mark.parametrize(
    ("told", "said"),
    [("no-such-command", "could not be run"), ("sh -c 'exit 3'", "ended with status 3: it said nothing")],
)
def test_a_command_that_cannot_be_told_changes_nothing(bitmill: Command, told: str, said: str) -> None:
    done = bitmill("retrain", "CONFIG", "--set", f"retrain.on_decision={told}")
    assert done.exit_code == 0, done.stderr
    assert said in done.stderr
    assert "promoted: " in done.stderr
    again = bitmill("retrain", "CONFIG", "--force")
    assert "unchanged: the only challenger is the champion itself" in again.stderr


def test_what_did_not_arrive_is_told_again_and_so_is_a_rollback(bitmill: Command, tmp_path: Path) -> None:
    failing = ("--set", "retrain.on_decision=sh -c 'exit 3'")
    for _ in range(2):
        assert "ended with status 3" in bitmill("retrain", "CONFIG", *failing).stderr
    assert bitmill("rollback", NAME, "--reason", "it rhymes").exit_code == 0
    assert not (tmp_path / "told.json").exists()
    bitmill("retrain", "CONFIG")
    assert json.loads((tmp_path / "told.json").read_text())["reason"] == "it rhymes"  # after that which was promoted
    assert "ended with status 3" not in bitmill("retrain", "CONFIG", *failing).stderr


def test_a_namespace_is_a_store_of_its_own(bitmill: Command) -> None:
    elsewhere = ("--namespace", "other")
    assert bitmill("history", NAME).exit_code == 0
    nothing = bitmill("history", NAME, *elsewhere)
    assert (nothing.exit_code, "Nothing was decided" in nothing.stderr) == (2, True)
    refused = bitmill("rollback", NAME, "--to", "2", "--reason", "mine", *elsewhere)
    assert (refused.exit_code, "/store decides, whose journal" in refused.stderr) == (2, True)
    assert json.loads(bitmill("gc", "--plan", "--json", *elsewhere).stdout)["garbage"] == []
    wrong = bitmill("lineage", f"{NAME}/1", "--namespace", "a/b")
    assert (wrong.exit_code, "namespace" in wrong.stderr) == (2, True)


def test_a_rollback_and_the_history_of_a_name(bitmill: Command, tmp_path: Path) -> None:
    for _ in range(3):
        bitmill("retrain", "CONFIG")
    back = bitmill("rollback", NAME, "--reason", "it rhymes", "--json")
    assert back.exit_code == 0, back.stderr
    assert json.loads(back.stdout)["champion"] == 1
    shown = bitmill("history", NAME, "--json")
    decisions, ticks = json.loads(shown.stdout)["decisions"], json.loads(shown.stdout)["ticks"]
    assert [(line["outcome"], line["count"]) for line in ticks[1:]] == [("unchanged", 2)]
    assert (ticks[0]["outcome"], ticks[0]["reason"]) == ("failed", "InterruptedError")  # while all this was prepared
    assert "2 ticks, the last at 20" in shown.stderr
    assert [d["decision"] for d in decisions] == ["promoted", "promoted", "rolled back"]
    assert "it rhymes" in shown.stderr
    assert "perplexity" in shown.stderr
    bitmill("retrain", "CONFIG")
    again = bitmill("history", NAME, "--json")
    assert [line["count"] for line in json.loads(again.stdout)["ticks"][1:]] == [2, 1]
    assert "unchanged" in again.stderr.partition("rolled back")[2]
    drawn = tmp_path / "trend.png"
    assert bitmill("history", NAME, "--out", str(drawn)).exit_code == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    refused = bitmill("history", NAME, "--out", str(tmp_path / "trend.gif"))
    assert (refused.exit_code, "ends in .png" in refused.stderr) == (2, True)
    nothing = bitmill("history", "nobody")
    assert nothing.exit_code == 2
    assert "Nothing was decided on 'nobody'" in nothing.stderr


def test_lineage_goes_both_ways(bitmill: Command, undecided: Schedule) -> None:
    bitmill("retrain", "CONFIG")
    shown = bitmill("lineage", f"{NAME}@champion", "--json")
    assert shown.exit_code == 0, shown.stderr
    document: dict[str, Any] = json.loads(shown.stdout)
    assert [*document["steps"]] == ["tokenize", "finetune", "cache", "distill", "evaluate", "pack", "register"]
    assert len(document["data"]["train"]) == 2
    assert document["shared"] == {}
    assert [file["shared_with"] for file in document["data"]["train"]] == [[f"{NAME}/1"], []]
    assert f"(jsonl), shared with {NAME}/1" in shown.stderr
    assert document["decisions"][0]["decision"] == "promoted"
    assert "data of train: 2 files" in shown.stderr
    first = json.loads(bitmill("lineage", f"{NAME}/1", "--json").stdout)
    assert [file["shared_with"] for file in first["data"]["train"]] == [[f"{NAME}/2"]]
    assert first["data"]["train"][0]["content"] == document["data"]["train"][0]["content"]
    text = undecided.folder / "text" / "0.jsonl"
    went = json.loads(bitmill("lineage", str(text), "--json").stdout)
    assert {*went[str(text)]["versions"]["train"]} == {f"{NAME}/1", f"{NAME}/2"}
    later = undecided.folder / "text" / "1.jsonl"
    assert json.loads(bitmill("lineage", str(later), "--json").stdout)[str(later)]["versions"] == {
        "train": [f"{NAME}/2"]
    }


def test_versions_of_one_teacher_share_it(bitmill: Command, undecided: Schedule) -> None:
    same = f"data.source={undecided.folder / 'text' / '0.jsonl'}"  # what the first version was made of
    trial = bitmill("compress", "CONFIG", "--bits", "4-4-8", "--set", "distill.steps=2", "--set", same, "--json")
    assert trial.exit_code == 0, trial.stderr
    version = json.loads(trial.stdout)["model_version"]["version"]
    shown = bitmill("lineage", f"{NAME}/{version}", "--json")
    assert json.loads(shown.stdout)["shared"] == {stage: [f"{NAME}/1"] for stage in ("tokenize", "finetune", "cache")}
    assert f"shared with {NAME}/1" in shown.stderr
    missing = bitmill("lineage", f"{NAME}/99")
    assert missing.exit_code == 2


def test_garbage_is_planned_and_collected(bitmill: Command, undecided: Schedule) -> None:
    bitmill("retrain", "CONFIG", "--set", "retrain.keep=1")
    with Decisions.of(NAME, undecided.config().resources).held() as deciding:  # which nothing shows of version 1
        deciding.append(Decision(decision="rolled back", reason="", name=NAME, at=now(), champion=2))
        deciding.put_aliases()
    assert json.loads(bitmill("gc", "--json").stdout)["garbage"] == []  # all is young
    planned = bitmill("gc", "--plan", "--keep", "1", "--grace", "0", "--json")
    assert planned.exit_code == 0, planned.stderr
    document = json.loads(planned.stdout)
    by_schedule = bitmill("gc", "--plan", "--grace", "0", "--json")
    assert json.loads(by_schedule.stdout)["bytes"] == document["bytes"]
    assert "tiny: retrain.keep is 1: so many of its newest versions keep all" in by_schedule.stderr
    bitmill("retrain", "CONFIG", "--set", "retrain.keep=2")  # unchanged, and the last word
    assert json.loads(bitmill("gc", "--plan", "--grace", "0", "--json").stdout)["garbage"] == []
    assert not document["deleted"]
    assert document["stages"].keys() == {"tokenize", "finetune", "cache", "distill"}
    assert document["bytes"] == sum(item["bytes"] for item in document["garbage"]) > 0
    assert "only versions before the newest 1 of their name" in planned.stderr
    assert "would go" in planned.stderr
    done = bitmill("gc", "--keep", "1", "--grace", "0", "--json")
    assert json.loads(done.stdout) == {**document, "deleted": True}
    assert "4 steps and temporary files went" in done.stderr
    assert json.loads(bitmill("gc", "--keep", "1", "--grace", "0", "--json").stdout)["garbage"] == []
    gone = bitmill("report", undecided.decisions[-1].run_key, "--out", "nowhere.html")
    assert (gone.exit_code, "keeps its package and scores alone" in gone.stderr) == (2, True)
    lineage = bitmill("lineage", f"{NAME}/1")
    assert [line.partition("; ")[2] for line in lineage.stderr.splitlines() if "its files are gone" in line] == [
        "its files are gone"
    ] * 4
    assert "data of train: 1 files" in lineage.stderr


def test_the_report_of_a_run_shows_what_was_decided(bitmill: Command, undecided: Schedule, tmp_path: Path) -> None:
    bitmill("retrain", "CONFIG")
    key = undecided.decisions[0].run_key
    page = tmp_path / "run.html"
    shown = bitmill("report", key, "--out", str(page))
    assert shown.exit_code == 0, shown.stderr
    text = page.read_text(encoding="utf-8")
    assert 'id="history"' in text
    assert undecided.decisions[0].reason.split(";")[0] in html.unescape(text)


@pytest.mark.parametrize(
    "values", [{"model.tokenizer": "x"}, {"model.tokenizer.train_bpe": 64}, {"model": {}}], ids=str
)
def test_a_recipe_has_no_tokenizer_of_its_own(values: dict[str, Any]) -> None:
    (path,) = values
    with pytest.raises(ValueError, match=f"recipes sets {path}, and with it the tokenizer"):
        Retrain(recipes=({}, values))
    Retrain(recipes=({"model.source": {"n_layer": 3}},))  # another size reads the same rows


def test_what_an_export_shows_is_a_flaw_and_any_other_fault_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    version: Any = SimpleNamespace(name=NAME, version=2)
    config: Any = SimpleNamespace(resources=None)

    def flaw(error: Exception) -> str:
        def failing(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr("jobs.export.export", failing)
        return _export_flaw(version, "gguf", config, Console())

    assert flaw(UnfitExportError("it differs")) == "it differs"
    for other in (ConfigError("the server is away"), RunError("the disk is full")):
        with pytest.raises(type(other), match=str(other)):
            flaw(other)
