"""User and password in the URI of a registry: they open it, and are in nothing that a run leaves or says."""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

import pipeline
from jobs.cli import app
from pipeline.config.load import load_config
from pipeline.config.resources import Resources
from pipeline.credentials import credentials_of, redacted, taking_none, with_credentials, without_credentials
from pipeline.errors import ConfigError
from pipeline.sources.files import pin_text
from pipeline.store.objects import open_objects
from pipeline.store.s3 import Bucket
from pipeline.tracking import outbox, runs
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Target
from tests.mlflow_server import LOGIN, assert_untold, serve_mlflow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The folder and the address of a registry that asks for both."""
    folder = tmp_path_factory.mktemp("server")
    with serve_mlflow(folder) as address:
        yield folder, address


@pytest.fixture
def bitmill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(path, fields):
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_run_and_a_sweep_tell_nobody(bitmill, tiny_fields, cloned, server, monkeypatch):
    folder, address = server
    short = {"distill": {"steps": 2, "eval_every": 1, "seed": 7}}
    swept = short | {"sweep": {"space": {"quant.bits": ["2-2-8", "8-8-8"]}}}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}@{address}")
    said = [
        bitmill("compress", write(cloned / "run.yaml", tiny_fields(cloned, **short)), "--json"),
        bitmill("sweep", write(cloned / "sweep.yaml", tiny_fields(cloned, **swept)), "--json"),
        bitmill("compress", cloned / "run.yaml", "--plan", "--json"),
        bitmill("generate", "tiny@champion", "Bado mika", "--max-tokens", "2"),
        bitmill("lookup", "--json"),
    ]
    assert [shown.exit_code for shown in said] == [0] * 5, [shown.stderr for shown in said]
    documents = [json.loads(shown.stdout) for shown in said if shown is not said[3]]
    assert len(documents[-1]) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    models = pipeline.lookup(tracking_uri=f"http://{LOGIN}@{address}")
    assert_untold(cloned, *(text for shown in said for text in (shown.stdout, shown.stderr)), repr(models))
    assert_untold(folder)


@pytest.mark.parametrize("command", ["compress", "lookup", "generate"])
def test_a_server_that_is_away_is_named_without_them(bitmill, tiny_fields, tmp_path, command):
    uri = f"http://{LOGIN}@127.0.0.1:9"
    path = write(tmp_path / "run.yaml", tiny_fields(tmp_path))
    arguments = {
        "compress": [path, "--set", f"resources.tracking_uri={uri}"],
        "lookup": ["--tracking-uri", uri],
        "generate": ["tiny@champion", "Bado", "--tracking-uri", uri],
    }
    said = bitmill(command, *arguments[command])
    assert said.exit_code == 2
    assert "http://127.0.0.1:9" in said.stderr
    assert_untold(tmp_path, said.stdout, said.stderr)


def test_wrong_ones_are_refused_without_a_word_of_them(server):
    uri = Resources(tracking_uri=f"http://gardener:guessed@{server[1]}").tracking_uri
    with pytest.raises(ConfigError, match="401") as refused:
        runs.connect(uri)
    assert not any(secret in str(refused.value) for secret in ("gardener", "guessed"))


def test_the_uri_s_win_over_those_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "else")
    runs.connect(Resources(tracking_uri=f"http://{LOGIN}@{server[1]}").tracking_uri)


def test_no_other_server_is_shown_them(server, tmp_path, monkeypatch):
    """Lines for another server wait in the outbox for a command that is given what that one asks for."""
    monkeypatch.setattr(outbox, "GIVE_UP_AFTER_S", 0.0)
    mine = Resources(tracking_uri=f"http://{LOGIN}@{server[1]}").tracking_uri
    theirs = mine.replace("127.0.0.1", "localhost")
    runs.connect(mine)
    with pytest.raises(ConfigError, match="URI of another server"):
        runs.client_of(theirs)
    with Outbox(tmp_path / "outbox") as box:
        for uri in (theirs, mine):
            box.put(Target(uri, "project", None, "k" * 32, uri, None), [{"step": 1, "distill/loss": 1.0}])
    assert box.unsent == {theirs: 1}


@pytest.mark.parametrize(
    ("uri", "bare", "login"),
    [
        ("https://user:p%40ss@host:5000/mlflow", "https://host:5000/mlflow", ("user", "p@ss")),
        ("https://user@host", "https://host", ("user", "")),
        ("https://host/path", "https://host/path", None),
        ("postgresql://me:secret@host/db?sslmode=require", "postgresql://host/db", ("me", "secret")),
        ("postgresql:///db?host=/run&password=secret", "postgresql:///db", None),
        ("sqlite:////a@b/c#d/mlflow.db", "sqlite:////a@b/c#d/mlflow.db", None),
        ("file:///home/me@corp/mlruns", "file:///home/me@corp/mlruns", None),
        ("/home/me@corp/mlruns", "/home/me@corp/mlruns", None),
        ("file://me:secret@host/mlruns", "file://host/mlruns", ("me", "secret")),
        ("databricks", "databricks", None),
    ],
)
def test_they_are_taken_off_a_uri_and_remembered(uri, bare, login):
    config = Resources(tracking_uri=uri)
    assert config.tracking_uri == bare
    assert credentials_of(bare) == login
    assert with_credentials(bare) == uri
    assert "secret" not in repr(config) + config.model_dump_json()
    assert without_credentials(bare) == bare


def test_a_database_is_opened_by_its_own_uri(tmp_path):
    """Whose driver is not installed here."""
    uri = Resources(tracking_uri="mysql+pymysql://me:secret@host/db").tracking_uri
    assert runs._admitted(uri) == "mysql+pymysql://me:secret@host/db"
    with pytest.raises(ConfigError, match=r"mysql\+pymysql://host/db.*pymysql") as refused:
        runs.connect(uri)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("uri", ["https://me:se/cret@host", "https://me:se#cret@host", "https://me:se?cret@host"])
def test_a_password_whose_end_cannot_be_told_is_refused_untold(tiny_fields, tmp_path, uri):
    path = write(tmp_path / "run.yaml", tiny_fields(tmp_path, resources={"tracking_uri": uri}))
    with pytest.raises(ConfigError, match=r"resources\.tracking_uri: an @ stands behind the host.*%2F") as refused:
        load_config(path)
    assert "cret" not in str(refused.value)
    with pytest.raises(ConfigError, match="an @ stands behind the host") as refused:
        pipeline.lookup(tracking_uri=uri)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("uri", ["me:s3cret@127.0.0.1:9", "http:/me:s3cret@host", "me:s3/cret@host"])
def test_so_is_one_without_a_scheme(bitmill, uri):
    with pytest.raises(ValidationError, match="it holds an @, but no scheme such as https://"):
        Resources(tracking_uri=uri)
    said = bitmill("lookup", "--tracking-uri", uri)
    assert said.exit_code == 2
    assert not any(secret in said.stderr for secret in ("s3", "cret"))


@pytest.mark.parametrize(
    ("knob", "uri"),
    [
        ("resources.storage_uri", "s3://key:secret@bucket/x"),
        ("resources.storage_uri", "s3://key:a/secret@bucket/x"),
        ("resources.storage_uri", "s3:/key:a/secret@bucket/x"),
        ("resources.storage_uri", "s3://k/ey:a/secret@bucket/x"),
        ("resources.ray_address", "ray://me:secret@host:10001"),
        ("resources.ray_address", "ray://me:a/secret@host:10001"),
        ("resources.ray_address", "me:secret@host:6379"),
        ("data.source", "s3://key:a/secret@bucket/*.txt"),
        ("data.validation", "s3://key:a/secret@bucket/*.txt"),
        ("data.test", "s3://key:a/secret@bucket/*.txt"),
    ],
)
def test_an_address_that_takes_none_is_refused_with_them(bitmill, tiny_fields, tmp_path, knob, uri):
    said = bitmill("compress", write(tmp_path / "run.yaml", tiny_fields(tmp_path)), "--set", f"{knob}={uri}", "--plan")
    assert said.exit_code == 2
    assert f"{knob}: it takes no user or password" in said.stderr
    assert "secret" not in said.stderr


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "pull", "report"])
def test_so_are_those_that_a_command_without_a_configuration_is_given(bitmill, command):
    arguments = {
        "generate": ["tiny@champion", "Bado"],
        "evaluate": ["tiny@champion", "--data", "x"],
        "export": ["tiny@champion", "--format", "onnx", "--out", "x"],
        "pull": ["tiny@champion", "x"],
        "report": ["key", "--out", "x.html"],
    }
    given = {"--storage-uri": "s3://key:a/cret@bucket/x", "--tracking-uri": "https://me:se/cret@host"}
    for option, uri in given.items():
        if (command, option) != ("report", "--tracking-uri"):  # which it has not
            said = bitmill(command, *arguments[command], option, uri)
            assert (said.exit_code, "cret" in said.stderr) == (2, False), said.stderr
            assert f"{option[2:].replace('-', '_')}: " in said.stderr


def test_an_error_in_python_does_not_hold_what_was_given():
    with pytest.raises(ValidationError, match="an @ stands behind the host") as refused:
        Resources(tracking_uri="https://me:se/cret@host")
    assert "cret" not in str(refused.value)


def test_so_is_one_that_no_configuration_holds():
    uri = "s3://key:a/secret@bucket/x"
    with pytest.raises(ConfigError, match=r"^--data: it takes no user or password.*AWS") as refused:
        pin_text(uri, "--data", None)
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^--data: it takes no user or password") as refused:
        pin_text("hf://user:a-secret@org/name/x.txt", "--data", None)
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="URI of a store or model cannot be used: it takes no user") as refused:
        open_objects(uri)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["/home/me@corp/x", "me@corp/x", "file:///home/me@corp/x", "hf://org/name@main/x.txt"])
def test_an_at_in_a_path_or_before_a_revision_is_none(path):
    assert taking_none(path) == path


def test_so_is_an_s3_endpoint(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://key:secret@127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(ConfigError, match=r"endpoint http://127\.0\.0\.1:9 was given with a user") as refused:
        Bucket("bucket", "")
    assert "secret" not in str(refused.value)


def test_text_from_elsewhere_is_shown_without_them(bitmill):
    said = bitmill("evaluate", "s3://key:a/secret@bucket/model", "--data", "x")
    assert (said.exit_code, "secret" in said.stderr) == (2, False)
    assert redacted("hf://name@main/x and a@b, then http://a@c/d@e") == "hf://name@main/x and a@b, then http://c/d@e"
    assert redacted("'s3://a:b/c@d@bucket/x', ray://e:f@g") == "'s3://bucket/x', ray://g"
    assert redacted("hf://user:a-secret@org/name") == "hf://org/name"
    assert redacted("http://host:5000/x of me@corp") == "http://host:5000/x of me@corp"
