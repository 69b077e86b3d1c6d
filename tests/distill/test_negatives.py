"""Draws of negatives that are not positions of the own sequence: `test_offsets.py` has those."""

import pytest
import torch

from pipeline.distill.negatives import (
    draw_ids,
    draw_partner,
    draw_positions,
    other_positions,
    other_tokens,
    pooled,
)

BATCH = torch.tensor([40, 7, 19, 3, 88])


def ids(*args):
    return tuple(draw_ids(*args, 50, 8).tolist())


def positions(*args):
    return tuple(draw_positions(*args, 50, 8).tolist())


@pytest.mark.parametrize("drawn", [ids, positions], ids=["ids", "positions"])
def test_draws_depend_on_seed_step_and_row_and_on_nothing_else(drawn):
    torch.manual_seed(0)
    first = drawn(1, 2, 3)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn(9, 9, 9)
    assert torch.equal(torch.rand(3), expected)  # the global generator is untouched
    assert drawn(1, 2, 3) == first
    others = [drawn(*args) for args in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (12, 3, 0), (1, 23, 0))]
    assert len({first, *others}) == 7
    assert ids(1, 2, 3) != positions(1, 2, 3)


@pytest.mark.parametrize("draw", [draw_ids, draw_positions], ids=["ids", "positions"])
@pytest.mark.parametrize(("of", "negatives"), [(1, 1), (1, 9), (5, 3), (5, 5), (5, 64), (300, 64), (0, 4)])
def test_draws_are_distinct_and_in_range(draw, of, negatives):
    for row in range(10):
        drawn = draw(1, 2, row, of, negatives)
        assert len(drawn) == len(drawn.unique()) == min(of, negatives)
        assert ((drawn >= 0) & (drawn < of)).all()


@pytest.mark.parametrize("draw", [draw_ids, draw_positions], ids=["ids", "positions"])
def test_everything_is_drawn_sooner_or_later(draw):
    assert torch.cat([draw(0, step, 0, 9, 2) for step in range(100)]).unique().tolist() == list(range(9))


def test_a_partner_is_another_row_of_the_batch_and_every_one_is_drawn():
    for row in BATCH.tolist():
        partners = {draw_partner(0, step, row, BATCH) for step in range(100)}
        assert partners == set(BATCH.tolist()) - {row}


def test_a_partner_depends_on_seed_step_row_and_batch():
    torch.manual_seed(0)
    found = [draw_partner(seed, step, row, BATCH) for seed in range(4) for step in range(4) for row in BATCH.tolist()]
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), expected)
    again = [draw_partner(seed, step, row, BATCH) for seed in range(4) for step in range(4) for row in BATCH.tolist()]
    assert found == again
    by_seed, by_step = [found[i * 20 : (i + 1) * 20] for i in range(4)], [found[i * 5 : (i + 1) * 5] for i in range(16)]
    assert len(set(map(tuple, by_seed))) == 4
    assert len(set(map(tuple, by_step))) > 8


@pytest.mark.parametrize("batch", [[7], [7, 7, 7]], ids=["one row", "one row in two epochs"])
def test_a_batch_of_one_row_has_no_partner(batch):
    assert draw_partner(0, 0, 7, torch.tensor(batch)) is None


def test_other_positions_wrap_around_the_valid_tokens():
    states = torch.arange(24.0).reshape(2, 6, 2)
    offsets = [torch.tensor([1, 3]), torch.tensor([], dtype=torch.long)]
    negatives = other_positions(states, torch.tensor([4, 1]), offsets)
    assert torch.equal(negatives.pool, states)
    assert negatives.index[0, :4].tolist() == [[1, 3], [2, 0], [3, 1], [0, 2]]  # padding is never a candidate
    assert negatives.taken.tolist() == [[[True, True]], [[False, False]]]


def test_where_all_have_as_many_negatives_none_is_masked():
    states, offsets = torch.arange(24.0).reshape(2, 6, 2), [torch.tensor([1, 3]), torch.tensor([2, 1])]
    negatives = other_positions(states, torch.tensor([6, 4]), offsets)
    assert negatives.index[:, 3].tolist() == [[4, 0], [1, 0]]
    assert negatives.taken is None
    assert pooled([torch.ones(2, 3), torch.zeros(2, 3)]).taken is None


def test_a_token_is_not_its_own_negative_and_all_get_as_many():
    known = torch.arange(8.0).reshape(1, 4, 2)
    negatives = other_tokens(known, torch.tensor([[30, 5, 99, 5]]), torch.tensor([[12, 30, 7, 5]]))
    assert torch.equal(negatives.pool, known)
    taken = [[place for place, chosen in enumerate(token) if chosen] for token in negatives.taken[0].tolist()]
    assert taken == [[0, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("drawn", [[], [5]], ids=["none", "one"])
def test_of_fewer_than_two_known_ids_there_are_no_negatives(drawn):
    ids = torch.tensor([[5, 6]])
    negatives = other_tokens(torch.ones(1, len(drawn), 2), ids, torch.tensor([drawn], dtype=torch.long))
    assert negatives.taken.shape == (1, 2, len(drawn))
    assert not negatives.taken.any()


def test_pools_of_several_sizes_stand_side_by_side():
    pools = [torch.ones(2, 3), torch.ones(0, 3), torch.full((1, 3), 2.0)]
    negatives = pooled(pools)
    assert negatives.taken.tolist() == [[[True, True]], [[False, False]], [[True, False]]]
    assert [pool[taken[0]].tolist() for pool, taken in zip(negatives.pool, negatives.taken, strict=True)] == [
        pool.tolist() for pool in pools
    ]
