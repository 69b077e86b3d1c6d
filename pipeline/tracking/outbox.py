"""The outbox to MLflow: a run's curves with steps and the machine's load, sent while it runs.

A server that goes away stops nothing: points wait in a file of JSON lines, are sent when the server is back, by this
command or the next, and what is left at the end is said.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.resources import Resources
from pipeline.errors import BitmillError
from pipeline.store.lease import Owner
from pipeline.store.locations import scratch_dir
from pipeline.store.records import Point
from pipeline.tracking import runs
from pipeline.tracking.runs import Target

SEND_EVERY_S = 2.0
GIVE_UP_AFTER_S = 20.0  # at the end


class Outbox:
    """Sends batches from a thread of its own. Use it as a context; `unsent` then says what has not been sent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _file_name(Owner.this_process(), f"{id(self):x}")  # in which points wait
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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        interrupted = kind is not None and not issubclass(kind, Exception)  # who waits for the end of the command
        end = time.monotonic() + (0.0 if interrupted else GIVE_UP_AFTER_S)
        while not self.flush() and time.monotonic() < end:
            time.sleep(SEND_EVERY_S)

    def put(self, target: Target, points: Sequence[Point], status: str | None = None) -> None:
        """Put points of a run, and what became of it if it ended; they are on disk when this returns."""
        line = {"target": asdict(target), "time_ms": int(time.time() * 1000), "points": list(points), "status": status}
        with self._lock:
            self._waiting.append(line)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def unsent(self) -> dict[str, int]:
        """Count the points that wait, by the name of their run."""
        with self._lock:
            counts: Counter[str] = Counter()
            for line in self._waiting:
                counts[line["target"]["name"]] += max(1, len(line["points"]))
            return counts

    def told(self) -> str:
        """Return what MLflow has not taken, for people; empty if there is nothing."""
        runs = ", ".join(f"{name} ({count})" for name, count in self.unsent.items())
        told = f"MLflow has not taken points of {runs}; they wait in {self.path}, and the next command sends them."
        return told if runs else ""

    def flush(self) -> bool:
        """Send what waits, and tell whether nothing is left. A server that is away keeps its own lines alone back."""
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
        """Tell whether a line could be sent; the server of one that could not is `away` for the rest of its batch."""
        uri, key = line["target"]["uri"], line["target"]["key"]
        if uri in away:
            return False
        try:
            target = Target(**line["target"])
            if key not in self._runs:
                self._runs[key] = runs.open_curves(target)
            self._runs[key].log(line["points"], line["time_ms"], line["status"])
        except (BitmillError, *runs.FAULTS):
            away.add(uri)
            self._runs.pop(key, None)  # what the server holds is asked anew
            return False
        return True

    def _keep(self) -> None:
        """Write down what waits, and only that."""
        if self._waiting:
            fresh = self.path.with_suffix(".new")
            fresh.write_text("".join(json.dumps(line) + "\n" for line in self._waiting), encoding="utf-8")
            fresh.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)
        for old in self._adopted:
            old.unlink(missing_ok=True)
        self._adopted.clear()

    def _work(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self.flush()


def _file_name(owner: Owner, mark: str) -> str:
    return f"{owner.host}~{owner.pid}~{owner.started_ticks}~{mark}.jsonl"


def _claimed(folder: Path) -> list[Path]:
    """Return files left by commands of this machine that run no more, renamed to ours: only one renames each."""
    mine, files = Owner.this_process(), []
    for index, path in enumerate(sorted(folder.glob("*.jsonl"))):
        host, pid, ticks, _ = path.stem.split("~")
        if Owner(host, int(pid), int(ticks)).gone():
            claimed = folder / _file_name(mine, f"claimed{index}-{time.monotonic_ns():x}")
            with contextlib.suppress(FileNotFoundError):  # another command was faster
                files.append(path.rename(claimed))
    return files


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed process
            lines.append(json.loads(text))
    return lines


def outbox_folder(resources: Resources) -> Path:
    """Return where points wait that MLflow has not taken: on this machine, shared by the commands of a project."""
    return Path(scratch_dir(resources)).expanduser() / "outbox"


def send_waiting(resources: Resources) -> str:
    """Send what earlier commands could not, from one that trains nothing; return what is left, for people."""
    with Outbox(outbox_folder(resources)) as outbox:
        pass
    return outbox.told()
