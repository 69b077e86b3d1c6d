"""The command line on sound input: one JSON document on stdout, and everything else on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import jobs
from jobs.cli import app
from pipeline.flow.line import LINE
from pipeline.flow.plan import plan_run
from pipeline.sources.splits import split_parts
from pipeline.stages.tokenize import documents_of
from pipeline.store.locations import tracking_uri
from pipeline.store.records import Package, Tokens

ROOT = Path(jobs.__file__).parents[1]


@pytest.fixture
def bitmill(tmp_path, monkeypatch):
    """`bitmill("compress", ...)` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config_file(finished, tmp_path):
    """The file that `finished` could have come from."""
    path = tmp_path / "run.yaml"
    fields = finished.plan.config.model_dump(mode="json", by_alias=True)
    path.write_text(yaml.safe_dump(fields))
    return path


def fresh_python(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_every_command_explains_itself(bitmill):
    top = get_command(app)
    benches = top.commands["bench"].commands
    names = [[name] for name in top.commands if name != "bench"] + [["bench", name] for name in benches]
    known = {"inspect", "compress", "sweep", "submit", "lookup", "report", "pull", "generate", "export", "evaluate"}
    assert known <= set(top.commands)
    assert set(benches) == {"quantizers", "paper", "sizes", "inference", "train", "real", "scale", "chaos"}
    listed = bitmill("--help").stdout + bitmill("bench", "--help").stdout
    for name in names:
        assert name[-1] in listed
        shown = bitmill(*name, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.stdout


def test_a_real_run_gives_one_document_on_stdout_and_all_else_on_stderr(tiny_fields, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path)))
    command = ["-m", "jobs.cli", "compress", path, "--json", "--bits", "4-4-8", "--set", "distill.steps=6"]
    done = fresh_python(*command, "--set", "register.name=four", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() >= {"run_key", "stages", "metrics", "size", "package_uri", "model_version"}
    assert [stage["stage"] for stage in document["stages"]] == [stage.name for stage in LINE]
    for stage in document["stages"]:
        assert stage.keys() >= {"stage", "key", "status", "seconds", "uri"}
        assert stage["status"] == "done"
        assert (Path(stage["uri"]) / "record.json").is_file()
    assert document["run_key"] == document["stages"][-1]["key"]
    for who in ("teacher", "student"):
        assert document["metrics"][who].keys() >= {"perplexity", "bits_per_byte"}
        assert document["metrics"]["validation"][who].keys() == document["metrics"][who].keys()
    assert document["metrics"]["student"].keys() >= {"kl_nats", "top1_agreement"}
    assert document["metrics"]["validation"]["student"] != document["metrics"]["student"]
    assert document["size"].keys() == {"teacher_bytes", "packed_bytes", "ratio", "paper_ratio"}
    assert document["model_version"] == {"name": "four", "version": 1, "aliases": ["champion"]}
    manifest = json.loads((Path(document["package_uri"]) / "manifest.json").read_text())
    assert manifest["bits"] == "4-4-8"
    for shown in (
        "test split",
        "perplexity, validation",
        "registered",
        "four version 1",
        "bitmill evaluate",
        "distill",
    ):
        assert shown in done.stderr


def test_a_second_run_reuses_every_stage_without_importing_ray(finished, config_file):
    code = f"""
import sys
from jobs.cli import app
app(["compress", {str(config_file)!r}, "--json"], standalone_mode=False)
assert "ray" not in sys.modules, "ray was imported"
"""
    done = fresh_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [stage["status"] for stage in document["stages"]] == ["reused"] * 7
    assert [stage["key"] for stage in document["stages"]] == [step.key for step in finished.plan.steps]
    assert document["metrics"]["student"] == finished.record("evaluate").student


def test_a_plan_starts_nothing(bitmill, tiny_fields, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path, resources={"workers": 2})))
    shown = bitmill("compress", path, "--plan", "--json", "--until", "distill")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert [(stage["stage"], stage["status"]) for stage in document["stages"]] == [(s.name, "run") for s in LINE[:4]]
    assert document["stages"][0]["reason"] == "never run before"
    assert document["rows"] > 100
    assert document["parameters"] == 36096
    assert document["cache_bytes"] == document["rows"] * 32 * 32 * 2
    assert "would run" in shown.stderr
    assert not (tmp_path / "store").exists()
    assert not ray.is_initialized()
    for_people = bitmill("compress", path, "--plan")
    assert (for_people.exit_code, for_people.stdout) == (0, "")
    assert "36,096 parameters" in for_people.stderr


def test_a_plan_says_what_is_reused_and_why_the_rest_is_not(bitmill, config_file):
    shown = bitmill("compress", config_file, "--plan", "--json", "--bits", "8-8-8")
    stages = {stage["stage"]: stage for stage in json.loads(shown.stdout)["stages"]}
    assert [stage["status"] for stage in stages.values()] == ["reused"] * 3 + ["run"] * 4
    assert stages["distill"]["reason"] == 'quant.bits: "2-2-8" -> "8-8-8"'


def test_the_store_of_the_environment_is_used_unless_the_file_names_one(bitmill, tiny_fields, tmp_path, monkeypatch):
    fields = tiny_fields(tmp_path)
    monkeypatch.setenv("BITMILL_STORAGE_URI", str(tmp_path / "from-environment"))
    for place, resources in (("store", fields["resources"]), ("from-environment", {"workers": 0})):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(fields | {"resources": resources}))
        shown = bitmill("compress", path, "--plan", "--json")
        assert all(stage["uri"].startswith(f"{tmp_path / place}/") for stage in json.loads(shown.stdout)["stages"])


def test_a_failed_gate_is_exit_status_1_with_advice(bitmill, tiny_config, cloned):
    path = cloned / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(cloned).model_dump(mode="json", by_alias=True)))
    failed = bitmill("compress", path, "--set", "register.gate.max_perplexity_ratio=1.0001", "--json")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "register.gate.max_perplexity_ratio" in failed.stderr
    assert f"{plan_run(tiny_config(cloned)).step(Package).dir.uri}1/package/" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_debug_option_shows_the_traceback(bitmill, tmp_path):
    failed = bitmill("compress", tmp_path / "none.yaml", "--debug")
    assert type(failed.exception).__name__ == "ConfigError"


@pytest.fixture
def test_text(finished, tmp_path):
    """The documents of the test split of `finished`, one a row."""
    step = finished.plan.step(Tokens)
    parts = [part for part in split_parts(step.recipe, step.locations) if part.split == "test"]
    rows = [text for part in parts for text in documents_of(part, step.recipe)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


@pytest.mark.parametrize("model", ["package", "checkpoint", "tiny@champion", "tiny/1"])
def test_evaluate_gives_the_reported_numbers(finished, checkpoint, bitmill, test_text, monkeypatch, model):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(finished.plan.config.resources))
    where = {"package": finished.package, "checkpoint": checkpoint}.get(model, model)
    shown = bitmill("evaluate", where, "--data", test_text, "--json", "--batch", 5)
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    evaluation = finished.record("evaluate")
    reported = evaluation.teacher if model == "checkpoint" else evaluation.student
    for name in ("perplexity", "bits_per_byte"):
        assert document["metrics"][name] == pytest.approx(reported[name], rel=1e-5)
    assert document["protocol"] == evaluation.protocol
    assert document["tokens"] > 100
    assert "perplexity" in shown.stderr
