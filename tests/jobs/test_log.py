"""`--log-format json`: each line on stderr is one object, with the run and, where there is one, the stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.commands.options import execute, open_console
from jobs.display import Display
from jobs.log import FIELDS, JSON
from pipeline.errors import ConfigError
from pipeline.store.lease import Owner


def lines(text):
    documents = [json.loads(line) for line in text.splitlines()]
    assert all(set(FIELDS) <= set(document) for document in documents)
    return documents


@pytest.fixture
def written(tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    fields = tiny_config(tmp_path / "store").model_dump(mode="json", by_alias=True)
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def test_a_run_is_told_as_objects(written, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    command = ["compress", written, "--until", "finetune", "--log-format", "json", "--json"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.stderr
    told = lines(said.stderr)
    steps = {stage["stage"]: stage["key"] for stage in json.loads(said.stdout)["stages"]}
    name = yaml.safe_load(Path(written).read_text())["name"]
    assert {line["run"] for line in told} == {name}
    assert ("finetune", "started") in {(line["stage"], line["event"]) for line in told}
    losses = [line for line in told if line["event"] == "measured" and line["loss"] is not None]
    assert losses
    assert all(line["stage"] == "finetune" and line["step"] > 0 for line in losses)
    assert [line["status"] for line in told if line["event"] == "finished"] == ["done", "done"]
    again = lines(CliRunner().invoke(app, command).stderr)
    assert [line["status"] for line in again if line["event"] == "finished"] == ["reused", "reused"]
    named = [line for line in told + again if line["stage"] is not None]
    assert {(line["stage"], line["key"]) for line in named} == {(name, key[:12]) for name, key in steps.items()}


def test_the_variable_sets_it_and_an_error_is_an_object_too(monkeypatch):
    monkeypatch.setenv("BITMILL_LOG_FORMAT", "json")
    said = CliRunner().invoke(app, ["compress", "no/such.yaml"])
    assert said.exit_code == 2
    (line,) = lines(said.stderr)
    assert (line["event"], line["run"], line["stage"]) == ("error", None, None)
    assert "no/such.yaml" in line["message"]


def test_another_format_is_refused():
    said = CliRunner().invoke(app, ["compress", "x.yaml", "--log-format", "xml"])
    assert said.exit_code == 2
    assert "--log-format is 'xml'; valid: text, json" in " ".join(said.stderr.split())
    with pytest.raises(ConfigError, match="xml"):
        open_console("xml")


def test_validations_are_told_always_and_losses_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("jobs.display.POINTS_S", float("inf"))
    with Display(open_console(JSON)) as display:
        display.named("distill", "0123456789abcdef")
        display.measured("distill", [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.5}])
        display.measured("distill", [{"step": 2.0, "validation_nats": 1.25}])
        display.waiting("pack", Owner.this_process())
    loss, validation, waiting = lines(capsys.readouterr().err)
    assert (loss["step"], loss["loss"], validation["validation_nats"]) == (1.0, 2.0, 1.25)
    assert loss["key"] == validation["key"] == "0123456789ab"
    assert (waiting["event"], waiting["stage"]) == ("waiting", "pack")


def test_a_line_that_is_an_object_stays_as_it_is_and_a_part_waits_for_its_end(capsys):
    console = open_console(JSON)
    inner = json.dumps(dict.fromkeys(FIELDS) | {"run": "inner"})
    console.out(inner, end="\n", highlight=False)
    console.out("half ", end="")
    console.out('and {"half"}\n', end="")
    console.out('{"not ours": 1}')
    told = lines(capsys.readouterr().err)
    assert told[0] == json.loads(inner)
    assert [line["message"] for line in told[1:]] == ['half and {"half"}', '{"not ours": 1}']


def test_a_document_stands_alone_on_stdout_whatever_libraries_print(capfd):
    """What they print in Python, and what below it, to the file that is stdout for all."""

    def work(console):
        print("a library's word")
        os.write(1, b"and one from below\n")
        return {"a": 1}

    execute(work, True, False)
    execute(work, False, False)
    shown = capfd.readouterr()
    assert json.loads(shown.out.partition("a library's")[0]) == {"a": 1}
    assert sorted(shown.err.splitlines()) == ["a library's word", "and one from below"]
