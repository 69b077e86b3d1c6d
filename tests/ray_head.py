"""A Ray head that asks for a token and has no bitmill, on ports of its own; and a proxy before it that a test cuts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil

from jobs.bench.chaos.cluster import free_port
from jobs.bench.chaos.processes import start

TOKEN = "5ecret0fTheHead"
DEADLINE_S = 300.0


@contextlib.contextmanager
def head_with_token(**environment: str) -> Iterator[tuple[str, Path]]:
    """Yield the dashboard's address and Ray's own folder; the head has these variables. It ends with all it started."""
    root = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, for the sockets in it
    port = free_port()
    python = _python_without_bitmill(root / "python")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HOME": str(root), "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **environment}
    options = [
        "--head",
        "--block",
        "--num-cpus=2",
        "--port=0",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={root / 'r'}",
    ]
    options += [
        f"--dashboard-port={port}",
        f"--ray-client-server-port={free_port()}",
        "--dashboard-agent-listen-port=0",
    ]
    command = [str(python), "-m", "ray.scripts.scripts", "start", *options]
    with open(root / "said", "w", encoding="utf-8") as said:
        head = start(
            [*command, "--min-worker-port=0", "--max-worker-port=0"],
            env=variables,
            cwd=root,
            stdout=said,
            stderr=said,
        )
    started: list[psutil.Process] = []
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + DEADLINE_S
        while not _answers(address):
            assert head.poll() is None, (root / "said").read_text()
            assert time.monotonic() < end, (root / "said").read_text()
            time.sleep(0.2)
        yield address, root
    finally:
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(DEADLINE_S)
        _, left = psutil.wait_procs(started, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=20)
        shutil.rmtree(root)


def _python_without_bitmill(folder: Path) -> Path:
    """Return the interpreter of a new environment that has each package of this one, but for the product."""
    venv.create(folder, symlinks=True)
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "bitmill" not in installed.name and installed.name != "__pycache__":
            (libraries / installed.name).symlink_to(installed)
    return folder / "bin" / "python"


def _answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10):
            return True
    except OSError:
        return False


class Proxy:
    """Passes connections on to a port of this machine, until it is cut; and again once it is mended."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._ends: set[socket.socket] = set()
        self._whole = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End all connections, and each new one at once."""
        self._whole = False
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole:
                caller.close()
                continue
            called = socket.create_connection(("127.0.0.1", self._target))
            self._ends |= {caller, called}
            for pair in ((caller, called), (called, caller)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._ends.discard(end)
