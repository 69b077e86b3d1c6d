"""`bitmill lookup` on the registry of a finished run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs import lookup as command
from jobs.cli import app
from jobs.commands.options import open_console
from pipeline.tracking.query import RegisteredModel


@pytest.fixture
def lookup(finished, tmp_path, monkeypatch):
    """`lookup("--bits", "2-2-8")` on the store of `finished`, wherever it is called from."""
    monkeypatch.chdir(tmp_path)
    store = finished.plan.config.resources.storage_uri
    return lambda *arguments: CliRunner().invoke(app, ["lookup", "--storage-uri", store, *map(str, arguments)])


def test_the_document_says_what_was_measured(lookup, finished):
    done = lookup("--max-size-mib", 40, "--json")
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)
    evaluation, package = finished.record("evaluate"), finished.record("pack")
    assert found.keys() == {
        *("name", "version", "aliases", "task", "bits", "quantizer", "size_mib"),
        *("metrics", "validation", "package_uri", "formats", "created_at"),
    }
    assert (found["name"], found["version"], found["aliases"]) == ("tiny", 1, ["champion"])
    assert (found["task"], found["bits"], found["quantizer"]) == ("language_modeling", "2-2-8", "quantgpt")
    assert found["size_mib"] * 2**20 == package.size.packed_bytes
    for name, value in evaluation.student.items():
        assert found["metrics"][name] == pytest.approx(value)
    assert found["validation"] == pytest.approx(
        evaluation.validation["student"]
        | {f"teacher_{name}": value for name, value in evaluation.validation["teacher"].items()}
    )
    assert found["package_uri"] == f"{finished.package}/"
    assert found["formats"] == ["bitmill"]


def test_any_metric_bounds_by_its_name(lookup):
    assert lookup("--at-least", "top1_agreement=0.01", "--at-most", "kl_nats=9").exit_code == 0
    none = lookup("--at-most", "generated_flips=0.5")
    assert none.exit_code == 3
    assert "generated_flips was not measured on validation" in none.stderr
    for bound, message in (("flips=1", "names no metric; valid: "), ("perplexity=low", "it takes METRIC=VALUE")):
        refused = lookup("--at-most", bound)
        assert refused.exit_code == 2
        assert f"--at-most '{bound}'" in refused.stderr
        assert message in " ".join(refused.stderr.split())


def test_a_person_sees_a_table_and_what_to_do_next(lookup):
    done = lookup("--alias", "champion")
    assert done.exit_code == 0
    assert done.stdout == ""
    for shown in ("tiny/1", "@champion", "2-2-8", "perplexity", "validation", "test", "bitmill pull tiny/1"):
        assert shown in done.stderr


def model(number, **fields):
    scores = {"perplexity": 17.0 + number, "accuracy": 0.5, "rougeL": 21.0}
    return RegisteredModel(
        **{
            "name": "gpt2-small-wikitext",
            "version": number,
            "aliases": ("champion",),
            "task": "language_modeling",
            "bits": "2-2-8",
            "quantizer": "quantgpt",
            "size_mib": 33.25,
            "metrics": {"perplexity": 18.0 + number},
            "validation": scores,
            "package_uri": "s3://bucket/x",
            "formats": ("bitmill", "compressed-tensors"),
            "created_at": "2026-11-27T06:00:00+00:00",
            **fields,
        }
    )


@pytest.mark.parametrize(("columns", "has"), [("80", ""), ("60", ""), ("160", "2026-11-27")])
def test_a_table_fits_the_terminal(monkeypatch, capsys, columns, has):
    monkeypatch.setenv("COLUMNS", columns)
    metrics = {"perplexity": 18.5, "accuracy": 0.4375, "rougeL": 20.5}
    models = [model(1), model(12, metrics=metrics, quantizer="seq", aliases=())]
    command.print_found(models, "perplexity", open_console())
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if not line.startswith("  ")]
    assert all(len(line) <= int(columns) for line in lines)
    for cell in ("gpt2-small-wikitext/1 ", "gpt2-small-wikitext/12", "@champion", "2-2-8", "18 / 19", "29 / 18.5"):
        assert any(cell in line for line in lines), shown
    assert has in shown
    assert ("in --json: created" in shown) is not bool(has)


def test_if_nothing_fits_the_nearest_are_said_and_the_status_is_3(lookup, finished):
    done = lookup("--max-perplexity", "1.5", "--format", "gguf", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout) == []
    perplexity = finished.record("evaluate").validation["student"]["perplexity"]
    excess = f"{perplexity:.4g} on validation is {perplexity / 1.5 - 1:.1%} above max_perplexity 1.5"
    assert f"tiny/1 (2-2-8): format: has bitmill, wanted gguf; {excess}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tracking-uri", "http://127.0.0.1:1"], "cannot be reached"),
        (["--bits", "5-5-8"], "bits"),
        (["--order-by", "bleu"], "--order-by 'bleu'"),
    ],
)
def test_what_cannot_be_asked_is_said_with_status_2(lookup, arguments, message):
    done = lookup(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
