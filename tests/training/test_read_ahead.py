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
    asked = ([1, 2], [50, 3]), ([50, 3], [7]), ([8], ()), ([7], [9]), ([4], [5]), ([9], ())
    given = [ahead.get(wanted, then) for wanted, then in asked]
    ahead.close()
    by_thread, by_main = ([rows for rows, main in readers if main == which] for which in (False, True))
    assert by_thread[:2] == [(50, 3), (7,)]  # which stays while others are asked for
    assert by_main == [(1, 2), (8,), (4,), (9,)]  # 9 again, once something else was to be read next
    for wanted, (ids, lengths, _) in zip([rows for rows, _ in asked], given, strict=True):
        assert torch.equal(ids, get(wanted)[0])
        assert torch.equal(lengths, ahead.lengths(wanted))
    begun = {*threading.enumerate()} - before
    assert not [thread for thread in begun if thread.name.startswith("read-ahead")]
