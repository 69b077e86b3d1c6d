from itertools import pairwise

import pytest
import torch

from pipeline.distill.random import draw
from pipeline.training.data_order import DataOrder, rank_rows
from pipeline.training.schedule import learning_rate

SHARDS = [7, 3, 0, 12, 5, 5, 1, 9]


def test_the_rate_falls_linearly_from_its_peak_to_1e_6():
    rates = [learning_rate(step, 50, 5e-4) for step in range(51)]
    assert rates[0] == 5e-4
    assert rates[50] == pytest.approx(1e-6, rel=1e-9)
    assert min(rates[:50]) > 1e-6
    falls = [a - b for a, b in pairwise(rates)]
    assert falls == pytest.approx([(5e-4 - 1e-6) / 50] * 50, rel=1e-9)


def test_the_rate_rises_linearly_during_warm_up_then_falls():
    rates = [learning_rate(step, 50, 1e-3, warmup_steps=10) for step in range(51)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)], rel=1e-12)
    assert rates[9] == rates[10] == 1e-3
    assert rates[10:] == [learning_rate(step, 40, 1e-3) for step in range(41)]
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_the_cosine_is_flat_at_both_ends_and_half_way_in_the_middle():
    rates = [learning_rate(step, 50, 1e-3, schedule="cosine") for step in range(51)]
    assert (rates[0], rates[50]) == (1e-3, pytest.approx(1e-6, rel=1e-9))
    assert rates[25] == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-9)
    falls = [a - b for a, b in pairwise(rates)]
    assert min(falls) > 0
    assert falls[0] < 0.04 * max(falls) > falls[-1]
    warm = [learning_rate(step, 50, 1e-3, warmup_steps=10, schedule="cosine") for step in range(51)]
    assert warm[9:] == [1e-3, *(learning_rate(step, 40, 1e-3, schedule="cosine") for step in range(41))]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 4)])
def test_short_runs_stay_between_zero_and_the_peak(steps, warmup):
    for step in range(steps):
        assert 0 < learning_rate(step, steps, 1e-3, warmup) <= 1e-3


def test_a_peak_below_the_final_rate_stays_where_it_is():
    assert {learning_rate(step, 10, 1e-8) for step in range(11)} == {1e-8}


def test_a_draw_depends_on_its_parts_alone():
    def first(*parts):
        return torch.rand(4, generator=draw(*parts)).tolist()

    torch.manual_seed(0)
    once = first("order", 1, 23)
    torch.manual_seed(1)
    assert first("order", 1, 23) == once
    others = [first(*parts) for parts in (("order", 12, 3), ("order", 1, 24), ("negatives", 1, 23), ("order", "1", 23))]
    assert once not in others
    assert len({tuple(o) for o in others}) == len(others)


def test_a_draw_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DataOrder(SHARDS, seed=1).batch(3, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("shards", [SHARDS, [1], [5], [4] * 40])
@pytest.mark.parametrize("window", [1, 3, 16])
def test_each_epoch_is_a_permutation_of_the_rows(shards, window):
    order = DataOrder(shards, seed=0, window=window)
    assert order.rows == sum(shards)
    for epoch in range(4):
        assert order.epoch(epoch).sort().values.tolist() == list(range(sum(shards)))


@pytest.mark.parametrize("batch_size", [1, 5, 8, 42, 100])
def test_the_batches_in_sequence_are_the_epochs_in_sequence(batch_size):
    order = DataOrder(SHARDS, seed=4, window=2)
    steps = 3 * order.rows // batch_size + 1
    rows = torch.cat([order.batch(step, batch_size) for step in range(steps)])
    assert rows.dtype == torch.int64
    epochs = torch.cat([DataOrder(SHARDS, seed=4, window=2).epoch(e) for e in range(len(rows) // order.rows + 1)])
    assert torch.equal(rows, epochs[: len(rows)])


def test_a_batch_is_a_pure_function_of_its_step():
    walked = DataOrder(SHARDS, seed=4, window=2)
    batches = [walked.batch(step, 10) for step in range(30)]
    for step in (29, 0, 13, 4, 28):
        torch.rand(7)
        assert torch.equal(DataOrder(SHARDS, seed=4, window=2).batch(step, 10), batches[step])
    for step in reversed(range(30)):
        assert torch.equal(walked.batch(step, 10), batches[step])


def test_a_batch_may_be_changed_by_its_reader():
    order = DataOrder(SHARDS, seed=4)
    first = order.batch(0, 10).clone()
    order.batch(0, 10).fill_(-1)
    assert torch.equal(order.batch(0, 10), first)


def test_the_order_differs_by_seed_and_by_epoch():
    orders = [DataOrder(SHARDS, seed).epoch(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_shards_of_a_window_change_with_the_epoch():
    order = DataOrder([4] * 20, seed=0, window=5)
    first_windows = {frozenset((order.epoch(epoch)[:20] // 4).tolist()) for epoch in range(6)}
    assert len(first_windows) == 6


def test_rows_are_mixed_across_the_shards_of_a_window():
    order = DataOrder([50, 50], seed=0, window=2).epoch(0)
    from_second = (order[:50] >= 50).sum().item()
    assert 10 < from_second < 40
    assert (order.diff() == 1).sum() < 20


@pytest.mark.parametrize("shards", [SHARDS, [6] * 11])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_reader_never_needs_more_shards_than_the_window(shards, window, epoch):
    shard_of_row = [shard for shard, rows in enumerate(shards) for _ in range(rows)]
    visited = [shard_of_row[row] for row in DataOrder(shards, seed=2, window=window).epoch(epoch)]
    last = {shard: place for place, shard in enumerate(visited)}
    for place in range(len(visited)):
        begun = set(visited[: place + 1])
        assert len([shard for shard in begun if last[shard] >= place]) <= window


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 32])
def test_the_rows_of_all_ranks_partition_a_batch(world, size):
    rows = torch.randperm(size)
    parts = [rank_rows(rows, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(parts), rows)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
