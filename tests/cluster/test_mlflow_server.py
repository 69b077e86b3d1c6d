"""A real `mlflow server` with a database, artifacts in S3 and basic auth, which is killed and comes back mid-run."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.bench.chaos.processes import start
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run, target_of
from pipeline.flow.run import run_plan
from pipeline.sweep.run import plan_sweep, run_sweep
from pipeline.tracking import runs
from pipeline.tracking.mlflow_listener import MlflowListener
from pipeline.tracking.outbox import Outbox, outbox_folder
from tests.conftest import Recorder
from tests.store.test_step_store import serve_s3

PASSWORD = "correct-horse-battery"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The server as a process of its own; what it keeps outlives it."""

    def __init__(self, root: Path, artifacts: str) -> None:
        self.root, self.port = root, free_port()
        self.artifacts = artifacts
        settings = root / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"admin_password = {PASSWORD}\ndatabase_uri = sqlite:///{root}/auth.db\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self.environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-test",
        }

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.root}/mlflow.db", "--port", str(self.port)),
            *("--default-artifact-root", self.artifacts, "--no-serve-artifacts"),
        ]
        with open(self.root / "server.log", "a") as log:
            self.process = start(command, env=self.environment, stdout=log, stderr=log)
        end = time.monotonic() + 180
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            assert self.process.poll() is None, (self.root / "server.log").read_text()[-2000:]
            time.sleep(0.3)
        raise TimeoutError((self.root / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.process.pid)
            for process in [*server.children(recursive=True), server]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_s3() as bucket:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        made = Server(tmp_path, f"{bucket}/mlflow")
        try:
            made.start()
            yield made
        finally:
            made.kill()


class Outage(Recorder):
    """Kills the server at the first validation of the student, and starts it again before the registration."""

    def __init__(self, server: Server, outbox: Outbox) -> None:
        super().__init__()
        self.server, self.outbox, self.while_away = server, outbox, 0

    def measured(self, stage: str, points: Any) -> None:
        if stage == "distill" and points[-1]["step"] == 0:
            self.outbox.flush()
            self.server.kill()
        super().measured(stage, points)

    def finished(self, stage: str, status: str, seconds: float) -> None:
        if stage == "pack":
            self.while_away = sum(self.outbox.unsent.values())
            self.server.start()
        super().finished(stage, status, seconds)


def test_training_outlives_the_server_and_nothing_is_lost(
    server: Server, tiny_config: Callable[..., Config], cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(cloned, distill={"seed": 5}, resources={"tracking_uri": server.uri})
    plan = plan_run(config)
    with Outbox(outbox_folder(config.resources)) as outbox:
        outage = Outage(server, outbox)
        outcome = run_plan(plan, MlflowListener(outage, outbox, target_of(plan, "2-2-8", None)))
    assert outage.while_away >= 10
    assert outbox.unsent == {}
    version = outcome.steps["register"].record
    client = runs.connect(server.uri)
    history = client.get_metric_history(version.run_id, "distill/loss")
    assert [metric.step for metric in history] == list(range(1, 13))
    assert {file.path for file in client.list_artifacts(version.run_id)} >= {"recipe.json", "pictures"}
    assert client.get_run(version.run_id).info.artifact_uri.startswith(server.artifacts)
    assert client.get_model_version_by_alias("tiny", "champion").version == "1"

    swept = {"space": {"quant.bits": ["2-2-8", "8-8-8"]}}
    config = tiny_config(cloned, distill={"seed": 5}, resources={"tracking_uri": server.uri}, sweep=swept)
    found = run_sweep(plan_sweep(config), Recorder())
    assert [trial.status for trial in found.trials] == ["done", "done"]
    assert found.untold == ""
    logged = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = {run.data.tags.get(runs.PARENT_TAG) for run in logged}
    (parent,) = (run.info.run_id for run in logged if run.info.run_id in parents)
    nested = [run for run in logged if run.data.tags.get(runs.PARENT_TAG) == parent]
    assert {run.data.tags[runs.KEY_TAG] for run in nested} == {trial.key for trial in found.trials}
    assert len(client.search_model_versions("name = 'tiny'")) == 2

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(ConfigError, match="cannot be reached"):
        runs.connect(server.uri)
