"""What people see: text as it is, whatever it looks like to a markup language."""

from __future__ import annotations

import re
from importlib import util

import pytest
from typer.testing import CliRunner

from jobs.bench import inference
from jobs.cli import app
from jobs.commands.options import open_console
from jobs.display import Display, print_table

LIKE_MARKUP = "pip install 'bitmill[export]' in [red]/data[/]/[/none], then :x: and \\[b]"


def shown(capsys):
    """What was printed, without the codes of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)


def test_text_that_looks_like_markup_is_printed_whole(capsys):
    console = open_console()
    console.print(LIKE_MARKUP)
    print_table(console, ["x" + LIKE_MARKUP], [["y" + LIKE_MARKUP]], title="z" + LIKE_MARKUP)
    printed = shown(capsys)
    for text in ("\n" + LIKE_MARKUP, "x" + LIKE_MARKUP, "y" + LIKE_MARKUP, "z" + LIKE_MARKUP):
        assert text in "\n" + printed


@pytest.mark.parametrize("terminal", [True, False])
def test_so_is_progress(capsys, monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "300")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(open_console()) as display:
        display.started(LIKE_MARKUP)
        display.advanced(LIKE_MARKUP, 1, 2, "note " + LIKE_MARKUP)
    assert shown(capsys).count(LIKE_MARKUP) >= 2


def test_what_goes_on_for_long_is_heard_of(capsys, monkeypatch):
    """Where no bar is drawn: at each quarter, after each silent minute, and where work goes on from before."""
    with Display(open_console()) as display, display.stage("verify") as advance:
        for done in (1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8):
            advance(done, 8)
        monkeypatch.setattr("jobs.display.SILENT_S", 0.0)
        advance(9, 10_000)
    lines = [re.sub(r"^\[ *[0-9.]+ s\] |[0-9.]+ s$", "", line).strip() for line in shown(capsys).splitlines()]
    quarters = [f"verify: {done}/8" for done in (2, 4, 3, 4, 6, 8)]
    assert lines == ["verify: started", *quarters, "verify: 9/10000", "verify: done in"]


def test_an_error_names_an_extra_whole(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    said = CliRunner().invoke(app, ["export", str(finished.package), "--format", "gguf", "--out", str(tmp_path / "x")])
    assert said.exit_code == 2
    assert "pip install 'bitmill[export]'" in said.stderr


def test_so_does_a_bench_of_what_it_leaves_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    inference._print({}, {"llama.cpp": LIKE_MARKUP}, open_console(), "title")
    assert f"llama.cpp: not measured. {LIKE_MARKUP}" in shown(capsys)


def test_a_model_and_its_data_are_shown_by_their_names(finished, corpus, tmp_path, monkeypatch):
    model = tmp_path / "a[b]"
    model.symlink_to(finished.package)
    (tmp_path / "text.txt").write_bytes(corpus.read_bytes()[:4000])
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["evaluate", "a[b]", "--data", "[t]ext.txt"])
    assert said.exit_code == 0, said.stderr
    assert "a[b] on [t]ext.txt" in " ".join(said.stderr.split())
