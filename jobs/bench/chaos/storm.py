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

S3 = tuple(fault for fault in FAULTS if fault != "slow")  # which at some milliseconds harms nobody
FIRST = ("training worker killed", "actor killed", "node killed", "command killed", "shard spoilt")  # once it can come
WORKERS = {  # by the title that Ray gives their processes
    "training worker killed": "ray::RayTrainWorker",
    "training's controller killed": "ray::TrainController",
    "actor killed": "ray::MapWorker",
}
ON_ACTORS = ("tokenize", "cache")
BETWEEN_S, SOON_S = (2.0, 5.0), (0.0, 1.0)
HELD_S = 3.0  # a process that is stopped and goes on
RATE = 0.2  # of requests, while S3 fails


class Storm:
    """Strikes while a command runs. `strikes` counts them by kind: a kill or a stop is one, and so are some seconds in
    which S3 fails in one way, of which `requests` counts the failed ones. `stages` has what other strikes met."""

    def __init__(self, cluster: Cluster, proxy: FaultProxy, objects: Objects, faults: int, seed: int) -> None:
        self._cluster, self._proxy, self._objects, self._faults = cluster, proxy, objects, faults
        self._draw = random.Random(seed)
        self.strikes, self.requests = Counter[str](), Counter[str]()
        self.stages: list[tuple[str, str]] = []

    def strike(self, command: Command) -> str | None:
        """Wait some seconds and do harm of one kind; return the kind, or None if there was nothing to do it to."""
        self._cluster.mend()
        kind = self._draw_kind(command)
        wait = self._draw.uniform(*(SOON_S if kind is None or kind in self.missing else BETWEEN_S))
        if kind is None:
            time.sleep(wait)
            return None
        if kind in FAULTS:
            struck = self._failing_s3(kind, wait)
        else:
            time.sleep(wait)
            struck = self._strike(kind, command)
        if not struck:
            return None
        self.strikes[kind] += 1
        self.stages += [] if kind in FAULTS else [(kind, command.progress.stage)]
        return kind

    @property
    def over(self) -> bool:
        """Tell whether there were as many strikes as there are to be."""
        return self.strikes.total() >= self._faults

    @property
    def missing(self) -> list[str]:
        """Return the kinds of `FIRST` that did not strike yet."""
        return [kind for kind in FIRST if not self.strikes[kind]]

    def _draw_kind(self, command: Command) -> str | None:
        """Return one of the kinds that struck least, but first those of `FIRST`, for which the last strikes are kept;
        None if they cannot come yet. What ends something waits until the command has moved since; a training worker,
        until it has something to go on from in both stages."""
        kinds: list[str] = [*S3, "training worker held"]
        progress, newest = command.follow(), self._newest_checkpoints()
        if progress.heard > progress.struck or newest != progress.newest:
            kinds += ["node killed", "command killed", "command interrupted"]
            kinds += ["shard spoilt"] if self._shards() else []
            kinds += [kind for kind, title in WORKERS.items() if self._cluster.workers(title)]
        early = [] if "distill" in newest else ["training worker killed"]
        idle = [] if progress.stage in ON_ACTORS else ["actor killed"]  # that of a stage which is done
        kinds = [kind for kind in kinds if kind not in (*early, *idle)]
        missing = self.missing
        kept = self.strikes.total() >= self._faults - len(missing)
        kinds = [kind for kind in kinds if kind in missing] or ([] if missing and kept else kinds)
        if not kinds:
            return None
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
        newest, progress = self._newest_checkpoints(), command.follow()
        if kind == "actor killed" and progress.stage not in ON_ACTORS:
            return False
        ended = {
            "node killed": lambda: command.running is not None and self._kill_node(),
            "command killed": lambda: _signalled(command.running, signal.SIGKILL),
            "command interrupted": lambda: _signalled(command.running, signal.SIGINT),
            "shard spoilt": lambda: command.running is not None and self._spoil(),
        }.get(kind, lambda: _signalled(self._one_of(WORKERS[kind]), signal.SIGKILL))()
        if ended:
            progress.newest, progress.struck = newest, progress.heard
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
        shards = self._shards()
        if not shards:  # the step is made again
            return False
        name = self._draw.choice(shards)
        with contextlib.suppress(FileNotFoundError):  # a step that is made again is cleared away first
            content = self._objects.read(name)
            spoilt = bytearray(content)
            spoilt[len(content) // 2] ^= 1
            return self._objects.swap(name, content, bytes(spoilt))
        return False

    def _shards(self) -> list[str]:
        """Return the shards of the cache, none before it is whole."""
        names = sorted(self._objects.sizes("cache/"))
        whole = any(name.endswith(f"/{RECORD}") for name in names)
        return [name for name in names if whole and name.endswith(".arrow")]

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
