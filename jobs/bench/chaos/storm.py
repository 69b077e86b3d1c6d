"""What befalls a command, its cluster and its S3: strikes of every kind, drawn from a seed."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter

import psutil

from jobs.bench.chaos.cluster import Cluster
from jobs.bench.chaos.command import Command
from jobs.bench.chaos.proxy import FAULTS, Fault, FaultProxy
from pipeline.store.objects import Objects
from pipeline.store.step_store import RECORD

WORKERS = {  # by the title that Ray gives their processes
    "training worker killed": "ray::RayTrainWorker",
    "training's controller killed": "ray::TrainController",
    "actor killed": "ray::MapWorker",
}
BETWEEN_S = (2.0, 5.0)
HELD_S = 3.0  # a process that is stopped and goes on
RATE = 0.2  # of requests, while S3 fails


class Storm:
    """Strikes while a command runs. `strikes` counts them by kind: a kill or a stop is one, and so are some seconds in
    which S3 fails in one way, of which `requests` counts the failed ones."""

    def __init__(self, cluster: Cluster, proxy: FaultProxy, objects: Objects, seed: int) -> None:
        self._cluster, self._proxy, self._objects = cluster, proxy, objects
        self._draw = random.Random(seed)  # noqa: S311
        self.strikes, self.requests = Counter[str](), Counter[str]()

    def strike(self, command: Command) -> str | None:
        """Wait some seconds and do harm of one kind; return the kind, or None if there was nothing to do it to."""
        self._cluster.mend()
        wait, kind = self._draw.uniform(*BETWEEN_S), self._draw_kind(command)
        if kind in FAULTS:
            struck = self._failing_s3(kind, wait)
        else:
            time.sleep(wait)
            struck = self._strike(kind, command)
        if not struck:
            return None
        self.strikes[kind] += 1
        return kind

    def _draw_kind(self, command: Command) -> str:
        """Return one of the kinds that struck least. What ends something waits until the command has moved since."""
        kinds: list[str] = [*FAULTS, "training worker held"]
        progress = command.follow()
        if progress.heard > progress.struck or self._newest_checkpoints() != progress.newest:
            kinds += ["node killed", "command killed", "command interrupted", "shard spoilt"]
            kinds += [kind for kind, title in WORKERS.items() if self._cluster.workers(title)]
        least = min(self.strikes[kind] for kind in kinds)
        return self._draw.choice([kind for kind in kinds if self.strikes[kind] == least])

    def _failing_s3(self, kind: Fault, seconds: float) -> bool:
        with self._proxy.at(RATE, kind) as injected:
            time.sleep(seconds)
        self.requests[kind] += injected[kind]
        return injected[kind] > 0

    def _strike(self, kind: str, command: Command) -> bool:
        """Do harm of a kind; tell whether there was something to do it to."""
        if kind == "training worker held":
            return self._held(self._one_of("ray::RayTrainWorker"))
        newest, heard = self._newest_checkpoints(), command.follow().heard
        ended = {
            "node killed": lambda: command.running is not None and self._kill_node(),
            "command killed": lambda: _signalled(command.running, signal.SIGKILL),
            "command interrupted": lambda: _signalled(command.running, signal.SIGINT),
            "shard spoilt": lambda: command.running is not None and self._spoil(),
        }.get(kind, lambda: _signalled(self._one_of(WORKERS[kind]), signal.SIGKILL))()
        if ended:
            command.progress.newest, command.progress.struck = newest, heard
        return ended

    def _one_of(self, title: str) -> psutil.Process | None:
        workers = self._cluster.workers(title)
        return self._draw.choice(workers) if workers else None

    def _kill_node(self) -> bool:
        self._cluster.kill_node(self._draw.choice(self._cluster.nodes))
        self._cluster.add()
        return True

    def _held(self, process: psutil.Process | None) -> bool:
        held = _signalled(process, signal.SIGSTOP)
        time.sleep(HELD_S if held else 0.0)
        return held and _signalled(process, signal.SIGCONT)

    def _spoil(self) -> bool:
        """Change a byte of a shard of the cache, once that is whole."""
        names = [name for name in self._objects.sizes("cache/") if name.endswith(".arrow")]
        if not names or not any(name.endswith(f"/{RECORD}") for name in self._objects.sizes("cache/")):
            return False
        name = self._draw.choice(sorted(names))
        with contextlib.suppress(FileNotFoundError):  # a step that is made again is cleared away first
            content = self._objects.read(name)
            spoilt = bytearray(content)
            spoilt[len(content) // 2] ^= 1
            return self._objects.swap(name, content, bytes(spoilt))
        return False

    def _newest_checkpoints(self) -> dict[str, int]:
        """Return the step of the newest checkpoint that the store has, by stage."""
        newest: dict[str, int] = {}
        for stage in ("finetune", "distill"):
            for name in self._objects.sizes(f"{stage}/"):
                place, _, number = name.rpartition("/checkpoint-")
                if place and number.endswith(".json"):
                    newest[stage] = max(newest.get(stage, 0), int(number.removesuffix(".json")))
        return newest


def _signalled(process: psutil.Process | None, number: int) -> bool:
    with contextlib.suppress(psutil.Error):
        if process is not None:
            process.send_signal(number)
            return True
    return False
