"""Eight processes that want the same step; run as `python -m tests.flow.racers CONFIG GO`.

Each says on a line of JSON what it does. Who works does not go on before the file GO is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jobs.bench.chaos.processes import LIBC, PR_SET_PDEATHSIG
from pipeline.config.run import Config
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.store.lease import Owner
from pipeline.store.objects import open_objects
from tests.conftest import Recorder

RACERS = 8


def say(**words: Any) -> None:
    """Write a line whole, whoever else writes."""
    os.write(1, f"{json.dumps({'pid': os.getpid(), **words})}\n".encode())


class Racer(Recorder):
    """Says what it hears; its work stands still before the file is there."""

    def __init__(self, go: Path) -> None:
        super().__init__()
        self.go = go

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        if stage not in self.progress:
            say(does="work")
        super().advanced(stage, done, total, note)
        while not self.go.exists():
            time.sleep(0.02)

    def waiting(self, stage: str, owner: Owner) -> None:
        say(does="wait", owner=owner.pid)


def race(config: str, go: str) -> None:
    """Plan once, and run eight times side by side."""
    plan, racers = plan_run(Config.model_validate_json(config), "tokenize"), []
    for _ in range(RACERS):
        if (racer := os.fork()) == 0:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            open_objects.cache_clear()  # connections are not to be shared
            outcome = run_plan(plan, Racer(Path(go)))
            record = outcome.steps["tokenize"].record.to_json()
            say(does="end", status=outcome.status["tokenize"], record=hashlib.sha256(record).hexdigest())
            os._exit(0)
        racers.append(racer)
    for racer in racers:
        os.waitpid(racer, 0)


if __name__ == "__main__":
    race(*sys.argv[1:])
