"""What a run is doing, sent to MLflow while it runs: curves with steps and the machine's load.

A server that goes away stops nothing: points wait in a file of JSON lines, are sent when the server is back, by this
command or the next, and what is left at the end is said.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.resources import Resources
from pipeline.errors import BitmillError
from pipeline.store.lease import Owner
from pipeline.store.locations import scratch_dir
from pipeline.store.records import Point
from pipeline.tracking import runs
from pipeline.tracking.listener import Observer
from pipeline.tracking.runs import Target, prefixed

SEND_EVERY_S, LOAD_EVERY_S = 2.0, 10.0
GIVE_UP_AFTER_S = 20.0  # at the end
SYSTEM = "system/"


class Outbox:
    """Sends batches from a thread of its own. Use it as a context; `unsent` then says what has not been sent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / _file_name(Owner.this_process(), f"{id(self):x}")
        self._adopted = _claimed(folder)
        self._waiting: list[dict[str, Any]] = [line for path in self._adopted for line in _lines(path)]
        self._lock, self._sending, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._runs: dict[str, runs.Curves] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._waiting:
            self._keep()

    def __enter__(self) -> Outbox:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        end = time.monotonic() + GIVE_UP_AFTER_S
        while not self.flush() and time.monotonic() < end:
            time.sleep(SEND_EVERY_S)

    def put(self, target: Target, points: Sequence[Point], status: str | None = None) -> None:
        """Points of a run, and what became of it if it ended; they are on disk when this returns."""
        line = {"target": asdict(target), "time_ms": int(time.time() * 1000), "points": list(points), "status": status}
        with self._lock:
            self._waiting.append(line)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def unsent(self) -> dict[str, int]:
        """Points that wait, by the name of their run."""
        with self._lock:
            found: dict[str, int] = {}
            for line in self._waiting:
                name = line["target"]["name"]
                found[name] = found.get(name, 0) + max(1, len(line["points"]))
            return found

    @property
    def path(self) -> Path:
        return self._file

    def told(self) -> str:
        """What MLflow has not taken, for people; empty if there is nothing."""
        runs = ", ".join(f"{name} ({count})" for name, count in self.unsent.items())
        return (
            runs
            and f"MLflow has not taken points of {runs}; they wait in {self._file}, and the next command sends them."
        )

    def flush(self) -> bool:
        """Try to send all that waits; whether nothing is left. A server that is away keeps its own lines alone back."""
        with self._sending:
            with self._lock:
                batch = list(self._waiting)
            away: set[str] = set()
            kept = [line for line in batch if not self._sent(line, away)]
            with self._lock:
                self._waiting[: len(batch)] = kept
                if len(kept) < len(batch):
                    self._keep()
                return not self._waiting

    def _sent(self, line: dict[str, Any], away: set[str]) -> bool:
        """Whether a line was sent; the server of one that was not is `away` for the rest of its batch."""
        uri, key = line["target"]["uri"], line["target"]["key"]
        if uri in away:
            return False
        try:
            self._send(line)
        except (BitmillError, *runs.FAULTS):
            away.add(uri)
            self._runs.pop(key, None)  # what the server holds is asked anew
            return False
        return True

    def _send(self, line: dict[str, Any]) -> None:
        target = Target(**line["target"])
        if target.key not in self._runs:
            self._runs[target.key] = runs.open_curves(target)
        self._runs[target.key].log(line["points"], line["time_ms"], line["status"])

    def _keep(self) -> None:
        """Write down what waits, and only that."""
        if self._waiting:
            fresh = self._file.with_suffix(".new")
            fresh.write_text("".join(json.dumps(line) + "\n" for line in self._waiting), encoding="utf-8")
            fresh.replace(self._file)
        else:
            self._file.unlink(missing_ok=True)
        for old in self._adopted:
            old.unlink(missing_ok=True)
        self._adopted.clear()

    def _work(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self.flush()


def _file_name(owner: Owner, mark: str) -> str:
    return f"{owner.host}~{owner.pid}~{owner.started_ticks}~{mark}.jsonl"


def _claimed(folder: Path) -> list[Path]:
    """Files that commands of this machine left which run no more, renamed to this process's: only one renames each."""
    mine, found = Owner.this_process(), []
    for index, path in enumerate(sorted(folder.glob("*.jsonl"))):
        host, pid, ticks, _ = path.stem.split("~")
        if Owner(host, int(pid), int(ticks)).gone():
            claimed = folder / _file_name(mine, f"claimed{index}-{time.monotonic_ns():x}")
            with contextlib.suppress(FileNotFoundError):  # another command was faster
                found.append(path.rename(claimed))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed process
            found.append(json.loads(text))
    return found


class LiveRun:
    """An observer of the flow that passes everything on, and sends the curves of a run to MLflow."""

    def __init__(self, observer: Observer, outbox: Outbox, target: Target) -> None:
        self._observer, self._outbox, self._target = observer, outbox, target

    def started(self, stage: str) -> None:
        if stage == "register":  # which completes the curves, so that nothing may come after it
            self._outbox.flush()
        self._observer.started(stage)

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        self._observer.advanced(stage, done, total, note)

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        self._outbox.put(self._target, prefixed(stage, points))
        self._observer.measured(stage, points)

    def finished(self, stage: str, status: str, seconds: float) -> None:
        self._observer.finished(stage, status, seconds)

    def waiting(self, stage: str, owner: Owner) -> None:
        self._observer.waiting(stage, owner)


def outbox_folder(resources: Resources) -> Path:
    """Where points wait that MLflow has not taken: on this machine, shared by the commands of a project."""
    return Path(scratch_dir(resources)).expanduser() / "outbox"


def send_waiting(resources: Resources) -> str:
    """Send what earlier commands could not, from one that trains nothing; what is left, for people."""
    with Outbox(outbox_folder(resources)) as outbox:
        pass
    return outbox.told()


@contextlib.contextmanager
def load_watched(outbox: Outbox, target: Target) -> Iterator[None]:
    """While inside, the load of this machine goes to the run."""
    stop = threading.Event()

    def watch() -> None:
        sample = runs.system_load()
        while not stop.wait(LOAD_EVERY_S):
            outbox.put(target, [{SYSTEM + name: value for name, value in sample().items()}])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
