"""What is measured of a step holds what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.bench.training import newton_schulz, peers, stages, workers
from jobs.bench.training.measures import Spread, counted, described, peak_flops, top_table
from jobs.bench.training.steps import Shape

CPU = torch.device("cpu")
MIB = 2**20
ROOT = Path(__file__).parents[4]
PEAKS = """
import json, torch
from jobs.bench.training.measures import Memory
CPU, MIB = torch.device("cpu"), 2**20
before = torch.ones(64 * MIB // 4)  # which is no part of it
memory = Memory(CPU)
kept = torch.ones(32 * MIB // 4)
kept_and_step = memory.peak_of(lambda step: torch.ones(48 * MIB // 4).sum(), 0)
memory = Memory(CPU)
blocks = [torch.ones(MIB // 64) for _ in range(16 * 256)]  # of 64 KiB: on the heap, which keeps the room
above = torch.ones(MIB // 64)  # so that it does not shrink
del blocks
torch.ones(128 * MIB // 4).sum()
after_a_peak = memory.peak_of(lambda step: None, 0)
print(json.dumps({"kept_and_step": kept_and_step, "after_a_peak": after_a_peak}))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """What a process of its own measures: in this one other tests' threads and garbage come and go."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


def test_memory_is_that_of_what_was_made_since_and_of_the_step(peaks: dict[str, int]) -> None:
    assert 76 * MIB < peaks["kept_and_step"] < 100 * MIB  # of 80, to some pages


def test_a_peak_before_the_step_does_not_count(peaks: dict[str, int]) -> None:
    assert peaks["after_a_peak"] < 32 * MIB


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


def test_an_iteration_of_newton_and_schulz_is_timed_with_and_without_what_a_cpu_has_for_bf16() -> None:
    names = [("fp32", "_ms"), ("bf16", "_ms"), ("of_fp32", "")]
    measured = newton_schulz.orthogonalising(1)
    assert set(measured) == {f"{name}{isa}{unit}" for name, unit in names for isa in ("", "_avx2")}
    assert measured["of_fp32_avx2"] == pytest.approx(measured["bf16_avx2_ms"] / measured["fp32_avx2_ms"])


def test_stages_are_timed_beside_the_least_that_does_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MIB", 0.05)
    monkeypatch.delenv(stages.PARALLEL, raising=False)
    shape, threads = Shape(1, 32, 2, 64, 16, 4, 4), torch.get_num_threads()
    for measure in (stages.tokenizing, stages.evaluating, stages.packing):
        measured = measure(shape, 1)
        stage, least = (value for name, value in measured.items() if name.endswith("_ms"))
        assert stage > 0
        assert measured["speed"] == pytest.approx(least / stage)
    assert torch.get_num_threads() == threads
    assert stages.PARALLEL not in os.environ


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
