"""A `bitmill compress` that is killed, and given again until it is done; and what its log says of its progress."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from jobs.bench.chaos.processes import start

TRAINING = ("finetune", "distill")


class Resumed(NamedTuple):
    """A training stage began again; `checkpoint` is the step of the newest that the store had at the last strike which
    ended something, `reached` the last step that the log told."""

    stage: str
    reached: int
    resumed: int
    checkpoint: int


@dataclass
class Progress:
    """How far training stages came, by what the log told; `again` has each time that one began again."""

    reached: dict[str, int] = field(default_factory=dict)
    again: list[Resumed] = field(default_factory=list)
    newest: dict[str, int] = field(default_factory=dict)  # checkpoint of each stage, as a strike found them
    stage: str = ""  # of the last event
    heard: int = 0  # events, of any stage
    struck: int = 0  # so many of them before the last strike that ended something

    def hear(self, line: str) -> None:
        """Take in a line of the log; one that is cut, as a killed process leaves it, says nothing."""
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            return
        kind, stage = event["event"], event["stage"]
        self.stage = stage or self.stage
        self.heard += kind in ("advanced", "measured", "finished")
        if kind not in ("advanced", "measured") or stage not in TRAINING:
            return
        step = int(event["done" if kind == "advanced" else "step"])
        if event.get("begins") and stage in self.reached:
            self.again.append(Resumed(stage, self.reached[stage], step, self.newest.get(stage, 0)))
        self.reached[stage] = step


class Command:
    """`bitmill compress` of a configuration, in a process of its own; `given` counts how often."""

    def __init__(self, config: Path, environment: dict[str, str]) -> None:
        self._config, self._environment, self.given, self.progress = config, environment, 0, Progress()
        self._out, self._log = config.with_suffix(".json"), config.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0

    def give(self) -> None:
        """Start it, once more."""
        words = [sys.executable, "-m", "jobs.cli", "compress", str(self._config), "--json", "--log-format", "json"]
        with open(self._out, "wb") as out, open(self._log, "ab") as log:
            self._process = start(words, stdout=out, stderr=log, env=self._environment)
        self.given += 1

    @property
    def running(self) -> psutil.Process | None:
        """Return its process, None if it ended."""
        if self._process is None or self._process.poll() is not None:
            return None
        return psutil.Process(self._process.pid)

    @property
    def status(self) -> int | None:
        """Return its exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    def follow(self) -> Progress:
        """Read what it logged since, and return how far it is."""
        with open(self._log, "rb") as log:
            log.seek(self._read)
            content = log.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            self.progress.hear(line)
        return self.progress

    @property
    def said(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    @property
    def document(self) -> dict[str, Any]:
        """Return what it printed for programs."""
        document: dict[str, Any] = json.loads(self._out.read_text(encoding="utf-8"))
        return document

    def end(self) -> None:
        """Kill it, if it runs, and all below it."""
        if (process := self.running) is not None:
            for below in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    below.kill()
        if self._process is not None:
            self._process.wait()
