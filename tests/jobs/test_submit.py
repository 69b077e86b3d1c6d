"""What is sent for a job, under which id, and what is made of its log; tests/cluster/test_submit.py has real jobs."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import jobs
from jobs import submit
from jobs.cli import app
from jobs.commands import runs
from jobs.submitted import MARK
from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.execution.jobs import JobEnd
from pipeline.flow.plan import plan_run
from tests.mlflow_server import LOGIN, PASSWORD, USER

ROOT = Path(jobs.__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tiny_fields, tmp_path, monkeypatch):
    """A configuration that names its text and its store as seen from the folder it lies in."""
    monkeypatch.chdir(tmp_path)
    fields = tiny_fields(tmp_path)
    (tmp_path / "text.txt").write_bytes(Path(fields["data"]["source"]).read_bytes())
    places = {"storage_uri": "store", "local_cache_dir": "scratch", "ray_address": "10.0.0.1:6379"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields | {"data": {"source": "*.txt"}, "resources": {"workers": 0, **places}}))
    return path


def bitmill(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(config_file, *options):
    shown = bitmill("submit", "compress", config_file, *options, "--plan", "--json")
    assert shown.exit_code == 0, shown.stderr
    return json.loads(shown.stdout)


def prepared(config_file, *options, job_id="any"):
    given, passed_on = runs._parsed("compress", str(config_file), list(options))
    return submit.prepare("compress", load_config(config_file, runs._chosen(**given)), passed_on, job_id, "2026-11-27")


def refused(*arguments, status=2):
    shown = bitmill("submit", *arguments)
    assert (shown.exit_code, shown.stdout) == (status, ""), shown.stderr
    assert "\n\n" not in shown.stderr.strip()
    return " ".join(shown.stderr.split())


def test_code_and_a_configuration_are_sent_and_nothing_else(config_file, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "weights.safetensors").write_bytes(b"0" * 1000)
    document = planned(config_file)
    modules = {str(path.relative_to(ROOT)) for name in ("jobs", "pipeline") for path in (ROOT / name).rglob("*.py")}
    assert (
        set(document["files"])
        == {"config.yaml", "bitmill.json", "jobs/report/page.html", "jobs/report/page.js"} | modules
    )
    assert document["bytes"] == sum(document["files"].values()) < 2 * 2**20
    for_people = bitmill("submit", "compress", config_file, "--plan")
    assert (for_people.exit_code, for_people.stdout) == (0, "")
    for said in ("config.yaml", "pipeline/stages", "nothing else is sent", document["submission_id"]):
        assert said in for_people.stderr


def test_what_an_installed_package_holds_is_sent():
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = {pattern for patterns in package_data.values() for pattern in patterns}
    assert {pattern.removeprefix("*") for pattern in patterns} | {".py"} == submit.CODE


def test_too_much_is_refused_with_the_largest_named(config_file, monkeypatch):
    monkeypatch.setattr(submit, "LIMIT_BYTES", 100 * submit.KIB)
    largest = max(submit.code_files().items(), key=lambda file: len(file[1]))[0]
    message = refused("compress", config_file, "--plan")
    for said in ("100 KiB is the limit", largest, "KiB)"):
        assert said in message


def test_the_job_means_what_the_command_means_here(config_file, tmp_path, monkeypatch):
    options = ["--bits", "4-4-8", "--set", "distill.steps=6", "--until", "pack", "--no-wait"]
    job = prepared(config_file, *options)
    assert job.entrypoint == "python -m jobs.submitted compress config.yaml --until pack --no-wait"
    here = load_config(config_file, ["quant.bits=4-4-8", "distill.steps=6"])
    fields = yaml.safe_load(job.files["config.yaml"])
    keys = [step.key for step in plan_run(here, "pack").steps]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = Config.model_validate(fields)
    assert [step.key for step in plan_run(there, "pack").steps] == keys
    assert there.resources.storage_uri == str(tmp_path / "store")
    assert there.resources.local_cache_dir == str(tmp_path / "scratch")
    assert there.resources.tracking_uri == f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    assert "ray_address" not in fields["resources"]  # Ray tells a job


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_arrives_as_it_was(name):
    config = load_config(ROOT / "configs" / name)
    there = Config.model_validate(yaml.safe_load(yaml.safe_dump(submit.sent_fields(config))))
    assert there.model_dump(exclude={"resources", "data"}) == config.model_dump(exclude={"resources", "data"})
    assert there.resources.workers == config.resources.workers


def test_folders_of_models_are_those_of_here(config_file, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for source, sent in (
        ("teacher", tmp_path / "teacher"),
        ("~/teacher", tmp_path / "teacher"),
        ("org/name", "org/name"),
    ):
        config = load_config(config_file, [f"model={{source: {source}}}", "finetune=null"])
        assert submit.sent_fields(config)["model"]["source"] == str(sent)


def test_an_id_is_of_what_is_submitted_and_of_the_day(config_file):
    first = prepared(config_file, "--bits", "4-4-8", "--until", "pack", job_id=None).id
    assert re.fullmatch("compress-tiny-2026-11-27-[0-9a-f]{8}", first)
    assert first == prepared(config_file, "--until=pack", "--set", "quant.bits=4-4-8", job_id=None).id
    others = [prepared(config_file, *options, job_id=None).id for options in ([], ["--until", "pack"], ["--no-wait"])]
    assert len({first, *others}) == 4
    assert planned(config_file)["submission_id"].startswith("compress-tiny-20")
    assert planned(config_file, "--id", "tiny-2026-11-27")["submission_id"] == "tiny-2026-11-27"


def test_a_tick_without_an_id_is_run_again_and_what_has_one_runs_once(config_file):
    config = load_config(config_file)

    def made(command, job_id):
        return submit.prepare(command, config, (), job_id, "2026-11-27")

    assert re.fullmatch("retrain-tiny-2026-11-27-[0-9a-f]{8}", made("retrain", None).id)
    repeats = {(command, job_id): made(command, job_id).repeats for command in runs.SUBMITTED for job_id in (None, "j")}
    assert [given for given, again in repeats.items() if again] == [("retrain", None)]


def test_paths_in_recipes_and_trials_are_those_of_here(config_file, tmp_path):
    (tmp_path / "teacher").mkdir()
    config = load_config(config_file)
    recipes = [{"data": {"validation": "v.txt"}, "model.source": "teacher"}, {"data.source": "s3://b/*"}]
    space = {
        "data.source": ["a/*.txt", "python://pydoc"],
        "model.source": ["teacher", "org/name"],
        "distill.lr": [1e-3],
    }
    fields = config.model_dump(by_alias=True) | {"retrain": {"recipes": recipes}, "sweep": {"space": space}}
    sent = submit.sent_fields(Config.model_validate(fields))
    first, second = sent["retrain"]["recipes"]
    assert first == {"data": {"validation": str(tmp_path / "v.txt")}, "model.source": str(tmp_path / "teacher")}
    assert second == recipes[1]
    assert sent["sweep"]["space"] == {
        "data.source": [str(tmp_path / "a" / "*.txt"), "python://pydoc"],
        "model.source": [str(tmp_path / "teacher"), "org/name"],
        "distill.lr": [1e-3],
    }


def test_paths_of_several_sources_are_those_of_here(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "data.source=[a.txt, {path: b/*.csv, weight: 2}, s3://bucket/c.txt]"
    config = load_config(config_file, [given, "data.test={path: set, split: dev}"])
    sent = submit.sent_fields(config)["data"]
    first, second, third = sent["source"]
    assert (first, second["path"], second["weight"]) == (str(tmp_path / "a.txt"), str(tmp_path / "b" / "*.csv"), 2)
    assert third == "s3://bucket/c.txt"
    assert (sent["test"]["path"], sent["test"]["split"]) == (str(tmp_path / "set"), "dev")


def test_no_password_is_sent_and_where_it_is_to_be_is_said(config_file, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://{LOGIN}@mlflow.example")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-0f-mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5ecret")
    shown = bitmill("submit", "compress", config_file, "--plan")
    assert "User and password of https://mlflow.example are not sent" in shown.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in shown.stderr
    config = load_config(config_file, [], {"tracking_uri": f"https://{LOGIN}@mlflow.example"})
    files = submit.prepare("compress", config, (), None, "").files
    assert b"https://mlflow.example" in files["config.yaml"]
    for secret in (USER, "s3cret", PASSWORD, "aws-0f-mine", "5ecret"):
        assert secret not in shown.stderr
        assert secret.encode() not in files["config.yaml"]


def test_a_password_where_none_is_taken_is_not_sent(config_file):
    source = f"model.source=https://{LOGIN}@hub.example/model"
    message = refused("compress", config_file, "--set", source, "--set", "model.tokenizer=null", "--plan")
    assert "holds a user or a password" in message
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lookup", "FILE"], ["COMMAND is 'lookup'", "compress, sweep"]),
        (["compress", "FILE"], ["--address is missing", "http://HEAD:8265"]),
        (["compress", "FILE", "--untl", "pack"], ["compress: No such option: --untl"]),
        (["compress", "FILE", "--until"], ["compress:", "--until"]),
        (["compress", "FILE", "spare"], ["compress:", "spare"]),
        (["sweep", "FILE", "--until", "pack"], ["sweep: No such option: --until"]),
        (["compress", "FILE", "--report", "page.html"], ["--report page.html", "bitmill report KEY"]),
        (["compress", "FILE", "--id", "../x", "--plan"], ["--id is '../x'", "NAME-2026-11-27"]),
        (["compress", "FILE", "--set", "distill.stepz=1", "--plan"], ["distill.stepz: unknown key"]),
        (["compress", "FILE", "--bits", "5-5-8", "--plan"], ["5-5-8"]),
    ],
    ids=str,
)
def test_what_cannot_be_submitted_is_said_before_anything_is_sent(config_file, arguments, said):
    message = refused(*(str(config_file) if argument == "FILE" else argument for argument in arguments))
    for needle in said:
        assert needle in message


AGAIN = "do as said"
LINES = [f"{MARK}{{\n", "one\n", f'{MARK} "a": [1]\n', "\n", f" {MARK}no\n", f"{MARK}}}\n", "the end"]


@settings(max_examples=30)
@given(st.lists(st.integers(0, len("".join(LINES)))))
def test_a_log_in_pieces_is_shown_but_for_the_document(cuts):
    shown = []
    log = submit.Log(shown.append)
    text, places = "".join(LINES), sorted({0, *cuts, len("".join(LINES))})
    for begin, end in pairwise(places):
        log.take(text[begin:end])
    log.close()
    assert "".join(shown) == f"one\n\n {MARK}no\nthe end\n"
    assert json.loads(log.document) == {"a": [1]}


def test_an_end_is_a_document_or_the_error_of_its_exit_status():
    assert submit.outcome("j", JobEnd("SUCCEEDED", 0, ""), '{"a": 1}', AGAIN) == {"a": 1}
    assert submit.outcome("j", JobEnd("FAILED", 3, "logs"), "[]", AGAIN) == []
    assert submit.outcome("j", JobEnd("FAILED", 3, "logs"), "", AGAIN) is None
    for end, kind, said in (
        (JobEnd("SUCCEEDED", 0, ""), RunError, "its document is not in what .*said again, do as said"),
        (JobEnd("FAILED", 2, "logs"), ConfigError, "exit status 2: its log, above"),
        (JobEnd("FAILED", 1, "logs"), RunError, "failed with exit status 1: .*to go on, do as said"),
        (JobEnd("FAILED", -9, "logs"), RunError, "exit status -9"),
        (JobEnd("STOPPED", None, ""), RunError, "was stopped; .*To go on, do as said"),
        (JobEnd("FAILED", None, "Traceback\nOSError: no node"), RunError, "failed: OSError: no node"),
        (JobEnd("FAILED", None, ""), RunError, "Ray does not say why"),
    ):
        with pytest.raises(kind, match=said):
            submit.outcome("j", end, "", AGAIN)


def test_a_cluster_that_forgot_the_job_is_told_with_what_to_do(config_file, monkeypatch):
    class Forgetful:
        address = "http://head:8265"

        def __init__(self, *given):
            pass

        def next_id(self, job_id):
            return job_id

        def hand_over(self, *given):
            return None

        def follow(self, *given):
            raise LookupError("no such job")

    monkeypatch.setattr(submit, "Jobs", Forgetful)
    said = refused("compress", config_file, "--address", "http://head:8265", "--id", "mine", status=1)
    assert "knows no job mine any more" in said
