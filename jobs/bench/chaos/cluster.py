"""A Ray cluster on this machine whose head and nodes are processes of their own, to be killed like machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from jobs.bench.chaos.processes import start
from pipeline.errors import RunError

STARTS_S = 300.0  # at most, on a machine that has other things to do
NODE_CPUS = 1


class Cluster:
    """A head that computes nothing, and nodes of one CPU each. What it started ends with it."""

    def __init__(self, nodes: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, for the sockets in it
        self._wanted, self._port, self._token = nodes, 0, secrets.token_hex(32)
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment by which a command reaches it, and nobody else of this machine does."""
        return {"RAY_ADDRESS": f"127.0.0.1:{self._port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Start a head, and the nodes that it is to have. Raises RunError if they do not come up."""
        self._port = free_port()
        options = ["--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false"]
        self.head = self._start("head", [*options, f"--ray-client-server-port={free_port()}"])
        self._await("head", self.head)
        for _ in range(self._wanted):
            self._await(self.add(), self.nodes[-1])  # by turns: Ray gives each half a minute

    def add(self) -> str:
        """Start a node, which is there some seconds later; return its name."""
        name = f"node-{len(list(self._folder.glob('node-*')))}"
        address = self.variables["RAY_ADDRESS"]
        self.nodes.append(self._start(name, [f"--address={address}", f"--num-cpus={NODE_CPUS}"]))
        return name

    def mend(self) -> None:
        """Start another node for each that did not come up."""
        for node in [node for node in self.nodes if node.poll() is not None]:
            self.nodes.remove(node)
            self.add()

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """End a node and all that runs on it, as a machine does whose power is cut."""
        self.nodes.remove(node)
        _kill_all(node)

    def kill_head(self) -> None:
        """End the head so, and the nodes, which do not outlive it."""
        for process in [self.head, *self.nodes]:
            if process is not None:
                _kill_all(process)
        self.head, self.nodes = None, []

    def workers(self, title: str) -> list[psutil.Process]:
        """Return what runs on the nodes and the head whose title begins so."""
        named = []
        for started in [self.head, *self.nodes]:
            for process in _below(started) if started is not None else []:
                with contextlib.suppress(psutil.Error):
                    if "".join(process.cmdline()).startswith(title):
                        named.append(process)
        return named

    def close(self) -> None:
        """End all of it, and remove its files."""
        self.kill_head()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command += ["--disable-usage-stats", f"--object-store-memory={100 * 2**20}"]
        if "--head" in options:
            command.append(f"--temp-dir={self._folder / 'r'}")
        patient = {"RAY_gcs_server_port_wait_time_s": "120", "RAY_agent_register_timeout_ms": "120000"}
        environment = os.environ | patient | self.variables
        del environment["RAY_ADDRESS"]
        with open(self._folder / name, "wb") as said:
            return start(command, stdout=said, stderr=said, cwd=self._folder, env=environment, start_new_session=True)

    def _await(self, name: str, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + STARTS_S
        said = self._folder / name
        while b"Ray runtime started" not in said.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                text = said.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RunError(f"The {name} of a Ray cluster on this machine did not start: {text}")
            time.sleep(0.1)


def _below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        below: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
        return below
    return []


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it: held first, so that none of them starts another."""
    processes = _below(process)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in [process.pid, *(below.pid for below in processes)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            processes = _below(process)
    process.wait()
    psutil.wait_procs(processes, timeout=30)


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def variables(values: dict[str, str], cleared: tuple[str, ...]) -> Iterator[None]:
    """Have these variables in the environment while inside, and none of the cleared ones."""
    before = {name: os.environ.get(name) for name in (*values, *cleared)}
    for name in cleared:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
