"""What is measured of a step holds what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.bench.training import peers, workers
from jobs.bench.training.measures import Memory, Spread, counted, described, peak_flops, top_table
from jobs.bench.training.steps import Shape

CPU = torch.device("cpu")
MIB = 2**20


def test_memory_is_that_of_what_was_made_since_and_of_the_step() -> None:
    before = torch.ones(64 * MIB // 4)  # which is no part of it
    memory = Memory(CPU)
    kept = torch.ones(32 * MIB // 4)
    peak = memory.peak_of(lambda step: torch.ones(48 * MIB // 4).sum(), 0)
    assert 76 * MIB < peak < 100 * MIB  # of 80, to some pages
    assert len(kept) < len(before)


def test_a_peak_before_the_step_does_not_count() -> None:
    blocks = [torch.ones(MIB // 64) for _ in range(16 * 256)]  # of 64 KiB: on the heap, which keeps the room
    above = torch.ones(MIB // 64)  # so that it does not shrink
    del blocks
    memory = Memory(CPU)
    torch.ones(128 * MIB // 4).sum()
    assert memory.peak_of(lambda step: None, 0) < 32 * MIB
    assert len(above) > 0


def test_operations_are_counted_and_views_are_not() -> None:
    matrix = torch.ones(4, 4)
    assert counted(lambda step: (matrix @ matrix).T[:3].sum(), 0, CPU) == {"launches": 2}


def test_a_spread_has_median_least_and_most() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_the_profile_names_what_takes_longest() -> None:
    assert "aten::mm" in top_table(lambda step: torch.ones(64, 64) @ torch.ones(64, 64), 0, CPU)


def test_the_device_is_named_and_its_peak_is_positive() -> None:
    assert described(CPU)["kind"] == "cpu"
    assert peak_flops(CPU) > 1e8


def test_our_fake_quantization_is_timed_beside_plain_layers_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    measured = peers.fake_quantization(32, 8, 2)
    assert measured["torchao"] == peers.NOT_RUN
    assert set(measured) == {"plain_ms", "ours_ms", "torchao"}


def test_a_worker_says_how_long_its_steps_and_exchanges_take(tmp_path: Path) -> None:
    shape, threads, exchange = Shape(1, 32, 2, 64, 16, 4, 4), torch.get_num_threads(), dist.all_reduce
    try:
        workers._worker(0, 1, str(tmp_path), shape, 2)
    finally:
        torch.set_num_threads(threads)
    step, exchanged = json.loads((tmp_path / "0.json").read_text())
    assert step > 0
    assert exchanged == 0  # of one worker
    assert dist.all_reduce is exchange


def test_exchanges_are_timed_where_there_are_workers(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with workers._timed_exchanges() as seconds:
            dist.all_reduce(torch.ones(2))
    finally:
        dist.destroy_process_group()
    assert len(seconds) == 1
