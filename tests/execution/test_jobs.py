"""The client of Ray's Jobs API without a cluster: addresses, tokens, and what a head or a gateway may answer."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import ConfigError, LostError, RunError
from pipeline.execution import jobs
from pipeline.execution.jobs import Jobs, checked_address, read_token

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"}
JOB = {"type": "SUBMISSION", "submission_id": "j", "status": "SUCCEEDED", "entrypoint": "true", "driver_exit_code": 0}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *jobs.ADDRESS_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jobs, "PAUSE_S", (0.0, 0.0))


class Head:
    """Answers as told: the next of the answers listed for a path, the last one for ever. Keeps what it was asked."""

    def __init__(self, **answers):
        self.answers = {"/api/version": [(200, VERSION)], **{f"/api/{path}": [*a] for path, a in answers.items()}}
        self.asked, head = [], self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                head.asked.append((self.command, self.path, self.headers.get("Authorization")))
                kind = "submit" if self.path == "/api/jobs/" else self.path.removeprefix("/api/").partition("/")[0]
                listed = head.answers[f"/api/{kind}"]
                status, content = listed.pop(0) if len(listed) > 1 else listed[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *_): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self):
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def heads():
    started = []

    def start(**answers):
        started.append(Head(**answers))
        return started[-1]

    yield start
    for head in started:
        head.close()


def test_an_address_is_that_of_a_dashboard():
    assert checked_address("head:8265") == "http://head:8265"
    assert checked_address("https://ray.example/prefix/") == "https://ray.example/prefix"
    for address in ("ray://head:10001", "http://", "", "http://head:99999", "http://head:8265?token=x", "s3://head"):
        with pytest.raises(ConfigError, match="--address is"):
            checked_address(address)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as caught:
        checked_address("http://gardener:s3cret@head:8265")
    assert "s3cret" not in str(caught.value)


def test_a_token_comes_from_where_ray_takes_it(monkeypatch, tmp_path):
    assert read_token(os.environ) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert read_token(os.environ) == "of-home"
    (tmp_path / "token").write_text(" of-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert read_token(os.environ) == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable\n")
    assert read_token(os.environ) == "of-variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token(os.environ) is None


def test_a_token_that_is_asked_for_and_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match=r"No token can be read from .*auth_token: No such file"):
        read_token(os.environ)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"from RAY_AUTH_TOKEN_PATH .*: Is a directory"):
        read_token(os.environ)
    (tmp_path / "token").write_bytes("t\u00f6ken".encode())
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="it is not ASCII") as caught:
        read_token(os.environ)
    assert caught.value.__cause__ is None  # which would show it


@pytest.mark.parametrize("token", ["two words", "a\nline", "t\u00f6ken", "a\tb"])
def test_what_no_header_takes_is_no_token_and_is_not_shown(monkeypatch, token):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN holds is no token") as caught:
        read_token(os.environ)
    assert token not in str(caught.value)


def test_the_token_is_in_a_header_and_the_address_is_the_one_given(heads, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    head = heads()
    Jobs(head.address, print, os.environ)
    assert head.asked
    assert {(path, token) for _, path, token in head.asked} == {("/api/version", "Bearer t0ken")}


@pytest.mark.parametrize(
    "answer", [(404, "no such page"), (200, "<html>"), (200, {"hello": 1}), (503, "away"), (500, "broken")], ids=str
)
def test_what_is_no_head_is_said_at_once(heads, answer):
    head = heads()
    head.answers["/api/version"] = [answer]
    with pytest.raises(ConfigError, match=f"Ray's Jobs API does not answer at {head.address}: .*http://HEAD:8265"):
        Jobs(head.address, print, os.environ)


def test_a_head_that_is_away_for_a_while_is_asked_again(heads, tmp_path):
    notes = []
    head = heads(jobs=[(503, "away"), (502, "away"), (200, JOB)], submit=[(500, "not asked")])
    assert Jobs(head.address, notes.append, os.environ).hand_over("j", "true", tmp_path, {}) == {}
    assert [note.split()[0] for note in notes] == ["the", "connected"]


@pytest.mark.parametrize("answer", [(504, "lost"), (500, "Job with submission_id j already exists")], ids=str)
def test_an_answer_that_was_lost_or_another_command_that_was_quicker_is_no_second_job(heads, tmp_path, answer):
    head = heads(packages=[(200, "")], jobs=[(404, ""), (200, {**JOB, "metadata": {"by": "us"}})], submit=[answer])
    assert Jobs(head.address, print, os.environ).hand_over("j", "true", tmp_path, {"by": "us"}) == {"by": "us"}
    assert [path for method, path, _ in head.asked if method == "POST"] == ["/api/jobs/"]


@pytest.mark.parametrize(
    ("known", "expected"), [("-", "j"), ("r", "j"), ("e-", "j-2"), ("er", "j-2"), ("eee-", "j-4")], ids=str
)
def test_what_is_run_again_attaches_to_a_run_that_goes_on_and_else_is_the_next(heads, known, expected):
    answers = {"-": (404, ""), "r": (200, {**JOB, "status": "RUNNING"}), "e": (200, JOB)}
    head = heads(jobs=[answers[each] for each in known])
    assert Jobs(head.address, print, os.environ).next_id("j") == expected
    asked = [path for _, path, _ in head.asked if path.startswith("/api/jobs/")]
    assert asked == ["/api/jobs/j", *(f"/api/jobs/j-{number}" for number in range(2, len(known) + 1))]


def test_what_a_gateway_did_not_pass_on_is_sent_again(heads, tmp_path):
    accepted = (200, {"job_id": "j", "submission_id": "j"})
    head = heads(packages=[(200, "")], jobs=[(404, "")], submit=[(503, "away"), accepted])
    assert Jobs(head.address, print, os.environ).hand_over("j", "true", tmp_path, {}) is None
    assert [path for method, path, _ in head.asked if method == "POST"] == ["/api/jobs/"] * 2


def test_a_job_that_the_cluster_refuses(heads, tmp_path):
    head = heads(packages=[(200, "")], jobs=[(404, "")], submit=[(500, "no agent to run it")])
    with pytest.raises(RunError, match=r"refuses the job j: .*no agent to run it"):
        Jobs(head.address, print, os.environ).hand_over("j", "true", tmp_path, {})


def test_a_job_that_the_cluster_does_not_know(heads):
    head = heads(jobs=[(404, "")])
    for ask in (
        Jobs(head.address, print, os.environ).stop,
        lambda job_id: Jobs(head.address, print, os.environ).follow(job_id, print),
    ):
        with pytest.raises(LookupError):
            ask("j")


def test_a_job_whose_log_is_gone_still_has_an_end(heads, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    notes = []
    head = heads(jobs=[(500, "no stream"), (200, JOB), (500, "its node is gone")])
    assert Jobs(head.address, notes.append, os.environ).follow("j", print) == ("SUCCEEDED", 0, "")
    assert notes[-1].startswith("The end of the job's log cannot be read: ")


def test_a_head_that_answers_no_more(heads, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    head = heads(jobs=[(503, "away")])
    with pytest.raises(LostError, match=r"has not answered for 0 s: .* The job j goes on without this command"):
        Jobs(head.address, print, os.environ).stop("j")
