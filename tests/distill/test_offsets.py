import pytest
import torch

from pipeline.distill.negatives import draw_offsets


@pytest.mark.parametrize("length", [2, 3, 5, 64, 200])
@pytest.mark.parametrize("negatives", [1, 4, 64])
def test_offsets_are_distinct_and_in_range(length, negatives):
    for row in range(20):
        offsets = draw_offsets(1, 2, row, length, negatives)
        assert offsets.dtype == torch.int64
        assert len(offsets) == len(offsets.unique()) == min(negatives, length - 1)
        assert offsets.min() >= 1
        assert offsets.max() <= length - 1


@pytest.mark.parametrize("length", [0, 1])
def test_rows_without_another_token_have_no_offsets(length):
    assert draw_offsets(1, 2, 3, length, 64).tolist() == []


def test_offsets_depend_on_their_arguments_and_on_nothing_else():
    torch.manual_seed(0)
    first = draw_offsets(1, 2, 3, 50, 8)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_offsets(9, 9, 9, 50, 8)
    assert torch.equal(torch.rand(3), expected)  # the global generator is untouched
    assert torch.equal(draw_offsets(1, 2, 3, 50, 8), first)
    others = [draw_offsets(*args, 50, 8).tolist() for args in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (12, 3, 0))]
    assert first.tolist() not in others
    assert len({tuple(o) for o in others}) == len(others)


def test_every_other_position_is_drawn_sooner_or_later():
    drawn = torch.cat([draw_offsets(0, step, 0, 9, 2) for step in range(200)])
    assert drawn.unique().tolist() == list(range(1, 9))
