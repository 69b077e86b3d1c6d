"""What is measured of a step holds what it should."""

from __future__ import annotations

import torch

from jobs.bench.training.measures import Memory, Spread, counted, described, peak_flops, top_table

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
    memory = Memory(CPU)
    torch.ones(128 * MIB // 4).sum()
    assert memory.peak_of(lambda step: None, 0) < 32 * MIB


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
