"""Jobs of a real Ray head that asks for a token: each runs once, is followed through cuts, and tells no secret."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from typer.testing import CliRunner

import jobs
from jobs import submit
from jobs.bench.chaos.processes import start
from jobs.cli import app
from pipeline.config.load import load_config
from pipeline.errors import LostError
from pipeline.execution import jobs as client
from pipeline.execution.jobs import Jobs
from tests.mlflow_server import LOGIN, assert_untold
from tests.ray_head import DEADLINE_S, TOKEN, Proxy, head_with_token

ROOT = Path(jobs.__file__).parents[1]
KEY = "aws-0f-mine"


@pytest.fixture(scope="module")
def head():
    with head_with_token() as (address, folder):
        yield address, folder


@pytest.fixture
def address(head, monkeypatch, tmp_path):
    """The head's address, in an empty folder, with its token in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):  # which Ray itself sets in a process that used it
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return head[0]


@pytest.fixture
def proxy(address):
    """A line to the head that can be cut."""
    line = Proxy(urlsplit(address).port)
    yield line
    line.close()


@pytest.fixture
def config_file(tiny_fields, tmp_path, address):
    fields = tiny_fields(tmp_path)
    (tmp_path / "text.txt").write_bytes(Path(fields["data"]["source"]).read_bytes())
    path = tmp_path / "run.yaml"
    resources = fields["resources"] | {"storage_uri": "store", "ray_address": "127.0.0.1:1"}
    path.write_text(yaml.safe_dump(fields | {"data": {"source": "*.txt"}, "resources": resources}))
    return path


def bitmill(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shell(script):
    """A job's command that runs a Python script."""
    return shlex.join(["python", "-u", "-c", script])


def test_a_job_runs_once_and_gives_what_the_command_would_give_here(config_file, address, head, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # which Ray's client would take in place of --address
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}@127.0.0.1:1")
    options = ["--bits", "4-4-8", "--set", "distill.steps=6", "--until", "distill"]
    here = bitmill("compress", config_file, *options, "--plan", "--json")
    assert here.exit_code == 0, here.stderr
    command = ["submit", "compress", config_file, *options, "--address", address, "--id", "tiny-1", "--json", "--"]
    first = bitmill(*command, "--plan")
    assert first.exit_code == 0, first.stderr
    there, expected = json.loads(first.stdout), json.loads(here.stdout)
    assert there.pop("estimate")["steps"].keys() == expected.pop("estimate")["steps"].keys()  # else by a probe's rate
    assert there.pop("free_bytes") > 0 < expected.pop("free_bytes")
    assert there == expected
    for said in ("would run", "never run before", "36,096 parameters"):  # the job's own words, and to people
        assert said in first.stderr
    assert submit.MARK not in first.stderr

    begun = Jobs(address, print, os.environ)._client.get_job_info("tiny-1")
    second = bitmill(*command, "--plan")
    assert (second.exit_code, second.stdout) == (0, first.stdout)
    assert "it is not run a second time" in second.stderr
    assert second.stderr.count("Running entrypoint") == 1
    after = Jobs(address, print, os.environ)._client.get_job_info("tiny-1")
    assert (after.start_time, after.end_time) == (begun.start_time, begun.end_time)

    other = bitmill(*command[:-1])
    assert (other.exit_code, other.stdout) == (2, "")
    assert "has a job tiny-1 already, of another command or configuration" in other.stderr

    record = after.json()
    assert "jobs.submitted" in record
    assert_untold(head[1] / "r", record, first.stderr, second.stderr)
    for secret in (TOKEN, KEY):
        assert secret not in record + first.stderr + first.stdout
        assert not [p for p in (head[1] / "r").rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_job_works_where_bitmill_is_not_installed_and_its_records_say_which_it_was(
    config_file, address, head, monkeypatch, tmp_path
):
    python = [str(head[1] / "python" / "bin" / "python"), "-I", "-c"]
    libraries, product = (
        subprocess.run([*python, f"from importlib import metadata; metadata.version({package!r})"], capture_output=True)
        for package in ("torch", "bitmill")
    )
    assert (libraries.returncode, product.returncode) == (0, 1), libraries.stderr
    assert b"No package metadata was found for bitmill" in product.stderr

    told = {"bitmill": "9.8.7", "commit": "c0ffee"}
    monkeypatch.setattr(submit, "code_version", lambda: told)
    options = ["--set", "resources.workers=1", "--until", "tokenize", "--json"]
    made = bitmill("submit", "compress", config_file, "--address", address, *options)
    assert made.exit_code == 0, made.stderr
    (record,) = (tmp_path / "store" / "tokenize").rglob("record.json")
    provenance = json.loads(record.read_text())["provenance"]
    assert provenance.items() >= {**told, "torch": version("torch")}.items()


def test_a_job_that_fails_passes_its_words_and_its_exit_status_on(config_file, address):
    arguments = ["submit", "compress", config_file, "--address", address, "--set", "data.source=nowhere/*.txt"]
    failed = bitmill(*arguments, "--json")
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "no file matches it" in failed.stderr
    assert "nowhere/*.txt" in failed.stderr
    assert failed.stderr.rstrip().endswith("ended with exit status 2: its log, above, says what to change.")
    assert bitmill(*arguments).exit_code == 2  # of the job that has ended


def test_a_tick_that_is_submitted_again_is_run_again(config_file, address):
    command = ["submit", "retrain", config_file, "--address", address]
    ticks = [bitmill(*command) for _ in range(2)]
    first, second = (re.search("^job (.*): handed over", tick.stderr, re.M)[1] for tick in ticks)
    assert second == f"{first}-2"
    for tick in ticks:
        assert "has no section retrain" in tick.stderr
    assert "it is not run a second time" in bitmill(*command, "--id", first).stderr
    assert f"job {first} had ended before" in bitmill(*command, "--id", first, "--stop").stderr
    assert f"has no job {first}-3" in bitmill(*command, "--stop").stderr


@pytest.mark.parametrize(("token", "said"), [("wr0ng", "refuses the token that was sent"), ("", "asks for a token")])
def test_a_wrong_or_missing_token_is_one_paragraph_without_it(config_file, address, monkeypatch, token, said):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    refused = bitmill("submit", "compress", config_file, "--address", address)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    assert "wr0ng" not in refused.stderr
    assert "\n\n" not in refused.stderr


def test_a_token_that_changes_while_a_job_is_followed(address, monkeypatch, tmp_path):
    cluster = Jobs(address, print, os.environ)
    cluster._client._headers = {"Authorization": "Bearer wr0ng"}
    with pytest.raises(client.ConfigError, match="refuses the token") as caught:
        cluster.follow("any", print)
    assert "wr0ng" not in str(caught.value)


def test_a_cut_line_loses_and_repeats_nothing_and_the_job_goes_on(proxy, tmp_path, monkeypatch):
    script = f"""
import pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
for part in range(3):
    while not (folder / f"go-{{part}}").exists():
        time.sleep(0.05)
    for line in range(50):
        print(f"{{part}}: line {{line}} \\u00fc")
    (folder / f"done-{{part}}").touch()
sys.exit(3)
"""
    notes, text = [], []
    done = [threading.Event() for _ in range(3)]

    def note(said):
        notes.append(said)
        if "cut" in said and not (tmp_path / "go-1").exists():
            (tmp_path / "go-1").touch()  # the job goes on while nobody hears it
            waiting = threading.Event()
            while not (tmp_path / "done-1").exists():
                waiting.wait(0.05)
            proxy.mend()

    def write(part):
        text.append(part)
        lines = "".join(text).splitlines()
        if "0: line 30 ü" in lines and not done[0].is_set():
            done[0].set()
            proxy.cut()
        if "1: line 49 ü" in lines and not done[1].is_set():
            done[1].set()
            (tmp_path / "go-2").touch()

    cluster = Jobs(proxy.address, note, os.environ)
    (tmp_path / "go-0").touch()
    assert cluster.hand_over("cut-1", shell(script), tmp_path, {}) is None
    assert cluster.follow("cut-1", write) == ("FAILED", 3, cluster._end("cut-1").message)
    assert [said.split("(")[0].split()[0] for said in notes] == ["the", "connected"]
    lines = [line for line in "".join(text).splitlines() if line[:3] in ("0: ", "1: ", "2: ")]
    assert lines == [f"{part}: line {line} ü" for part in range(3) for line in range(50)]
    monkeypatch.setattr(client, "SILENT_S", 0.2)  # a stream that is quiet for as long is opened anew
    again = []
    cluster.follow("cut-1", again.append)
    assert "".join(again) == "".join(text)


def test_a_line_that_stays_cut_is_given_up_in_time(proxy, tmp_path, monkeypatch):
    cluster = Jobs(proxy.address, print, os.environ)
    proxy.cut()
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    for ask in (lambda: cluster.stop("cut-2"), lambda: cluster.hand_over("cut-2", "true", tmp_path, {})):
        with pytest.raises(LostError, match=r"has not answered .* The job cut-2 goes on without this command"):
            ask()


def test_of_two_who_hand_over_the_same_id_one_begins_it(address, tmp_path):
    clusters = [Jobs(address, print, os.environ) for _ in range(4)]
    barrier = threading.Barrier(len(clusters))
    given = {}

    def race(number):
        barrier.wait()
        given[number] = clusters[number].hand_over("race-1", "echo begun", tmp_path, {"by": str(number)})

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number, before in given.items() if before is None]
    assert [before for before in given.values() if before is not None] == [{"by": str(winner)}] * 3
    text = []
    assert clusters[0].follow("race-1", text.append)[:2] == ("SUCCEEDED", 0)
    assert "".join(text).splitlines().count("begun") == 1


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back_and_how_to_stop_it(config_file, address, tmp_path):
    registry = "resources.tracking_uri=http://{}127.0.0.1:1"
    job = submit.prepare("compress", load_config(config_file, [registry.format("")]), ("--plan",), "long-1", "")
    cluster = Jobs(address, print, os.environ)
    cluster.hand_over("long-1", "echo at work; exec sleep 1000", tmp_path, {"bitmill": job.digest})
    command = ["submit", "compress", str(config_file), "--address", address, "--id", "long-1"]
    with open(tmp_path / "said", "w+", encoding="utf-8") as said:
        following = start(
            [sys.executable, "-m", "jobs.cli", *command, "--", "--set", registry.format(f"{LOGIN}@"), "--plan"],
            stderr=said,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
        )
        while "\nat work" not in (shown := (tmp_path / "said").read_text()):
            assert following.poll() is None, shown
            threading.Event().wait(0.1)
        following.send_signal(signal.SIGINT)
        assert following.wait(DEADLINE_S) == 1
    shown = (tmp_path / "said").read_text()
    assert "detached: the job long-1 goes on" in shown
    assert "Traceback" not in shown
    assert "s3cret" not in shown
    follow, stop = (
        shlex.split(re.search(f"^{said}: bitmill (.*)$", shown, re.M)[1]) for said in ("Follow.*", "Stop.*")
    )
    assert follow == [*command, "--", "--set", registry.format(""), "--plan"]
    assert cluster._end("long-1") is None

    stopped = bitmill(*command, "--stop", "--json")
    assert stop == [*command, "--stop"]
    assert json.loads(stopped.stdout) == {"submission_id": "long-1", "status": "STOPPED"}
    assert cluster._end("long-1").status == "STOPPED"
    attached = bitmill(*follow)
    assert attached.exit_code == 1
    assert "at work" in attached.stderr
    assert "The job long-1 was stopped; what was committed is kept" in attached.stderr
    nobody = bitmill(*command[:-1], "long-2", "--stop", "--json")
    assert (nobody.exit_code, json.loads(nobody.stdout)) == (3, {})
    assert "has no job long-2" in nobody.stderr
