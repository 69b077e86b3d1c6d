"""Rows that are wanted next are read by a thread meanwhile, and come as if they had not been."""

import threading

import pytest
import torch

from pipeline.store.shards import Rows
from pipeline.training.read_ahead import ReadAhead
from tests.training.cases import CPU, Case

pytestmark = pytest.mark.usefixtures("case")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.make(tmp_path_factory.mktemp("rows"))


def test_the_next_rows_are_read_by_a_thread_and_once(case: Case) -> None:
    rows = Rows(case.tokens, case.train)
    readers: list[tuple[tuple[int, ...], bool]] = []
    get = rows.get

    def recording(row_ids, pin=False):
        readers.append((tuple(row_ids), threading.current_thread() is threading.main_thread()))
        return get(row_ids, pin)

    rows.get = recording  # type: ignore[method-assign]
    before = {*threading.enumerate()}  # those of trainers that other tests made, until they are collected, among them
    ahead = ReadAhead(rows, CPU)
    given = [ahead.get([1, 2], then=[50, 3]), ahead.get([50, 3], then=[7]), ahead.get([8]), ahead.get([7])]
    ahead.close()
    assert readers[:2] == [((1, 2), True), ((50, 3), False)]
    assert [*readers[2:]].count(((7,), True)) == 1  # what was read ahead in vain is read again
    for wanted, (ids, lengths, _) in zip(([1, 2], [50, 3], [8], [7]), given, strict=True):
        assert torch.equal(ids, get(wanted)[0])
        assert torch.equal(lengths, ahead.lengths(wanted))
    begun = {*threading.enumerate()} - before
    assert not [thread for thread in begun if thread.name.startswith("read-ahead")]
