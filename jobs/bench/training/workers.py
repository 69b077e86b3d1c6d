"""What a second worker gains: the same step by one process and by two, joined by gloo, one thread each."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from jobs.bench.training.held import OwnStore
from jobs.bench.training.measures import seconds_a_step
from jobs.bench.training.steps import Shape, Steps
from pipeline.models.device import CPU

WARM_UP = 2


def of_two(shape: Shape, rounds: int) -> dict[str, float]:
    """Time a step of the preset `paper`, teacher online, by one worker and by two; return the milliseconds of each, the
    share of the ideal half, and the share of the step that exchanging gradients takes. Not of `best`: what Muon takes
    each worker takes whole, and a batch this small shows little else."""
    alone, _ = _timed(1, shape, rounds)
    together, exchanged = _timed(2, shape, rounds)
    shares = {"of_ideal": alone / (2 * together), "all_reduce": exchanged / together}
    return {"one_ms": 1e3 * alone, "two_ms": 1e3 * together, **shares}


def _timed(world: int, shape: Shape, rounds: int) -> tuple[float, float]:
    """Return the seconds of a step, and those in it that the slowest worker waits in exchanges."""
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, shape, rounds)
        start_processes(_worker, given, nprocs=world, start_method="spawn")
        measured = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return max(step for step, _ in measured), max(exchange for _, exchange in measured)


def _worker(rank: int, world: int, folder: str, shape: Shape, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    with OwnStore(Path(folder, str(rank))) as store, _timed_exchanges() as exchanged:
        steps = Steps(store, shape, CPU, False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        case = steps.distill("paper", cached=False)
        for step in range(WARM_UP):
            case.take(step)
        exchanged.clear()
        times = [seconds_a_step(case.take, WARM_UP + turn, 1, CPU) for turn in range(rounds)]
        if case.trainer is not None:
            case.trainer.rows.close()
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps([median(times), sum(exchanged) / rounds]))


@contextmanager
def _timed_exchanges() -> Iterator[list[float]]:
    """Have the seconds of every sum over workers be added to a list, which is yielded."""
    exchange, seconds = dist.all_reduce, list[float]()

    def timed(*arguments: Any, **settings: Any) -> Any:
        begun = time.perf_counter()
        given = exchange(*arguments, **settings)
        seconds.append(time.perf_counter() - begun)
        return given

    dist.all_reduce = timed
    try:
        yield seconds
    finally:
        dist.all_reduce = exchange
