"""A journal of decisions: appended by whoever holds the newest token, whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import FencedOffError
from pipeline.store.journal import Head, Journal
from pipeline.store.objects import open_objects
from tests.store.test_step_store import serve_s3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=["directory", "s3"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    place = str(tmp_path) if request.param == "directory" else request.getfixturevalue("bucket")
    return Journal(open_objects(place), f"retrain/{tmp_path.name}/", "history of chat")


def test_entries_are_read_from_the_last_one_back(journal: Journal) -> None:
    assert list(journal.entries()) == []
    assert journal.claim(1) == Head(1)
    for number in range(3):
        journal.append({"number": number}, 1)
    assert [entry["number"] for entry in journal.entries()] == [2, 1, 0]
    assert journal.claim(4).count == 3
    journal.append({"number": 3}, 4)
    assert [entry["number"] for entry in journal.entries()] == [3, 2, 1, 0]


def test_what_was_told_is_not_told_again(journal: Journal) -> None:
    journal.claim(1)
    for number in range(3):
        journal.append({"number": number}, 1)
    assert journal.untold() == [(1, {"number": 0}), (2, {"number": 1}), (3, {"number": 2})]
    journal.tell(2, 1)
    assert journal.untold() == [(3, {"number": 2})]
    journal.claim(2)
    with pytest.raises(FencedOffError):
        journal.tell(3, 1)
    journal.append({"number": 3}, 2)
    assert [number for number, _ in journal.untold()] == [3, 4]
    journal.tell(4, 2)
    assert journal.untold() == []
    assert journal.head().count == 4


def test_notes_change_and_go_with_the_entry_that_takes_them(journal: Journal) -> None:
    with pytest.raises(KeyError):
        journal.written()
    journal.claim(1)
    assert journal.head().notes == {}
    journal.note({"keep": 1, "steps": [["a", "b"]]}, 1)
    written = journal.written()
    journal.append({"number": 0}, 1)
    journal.tell(1, 1)
    assert journal.head().notes == {"keep": 1, "steps": [["a", "b"]]}
    journal.append({"number": 1}, 1, {"keep": 1})
    assert (journal.head().notes, journal.head().count) == ({"keep": 1}, 2)
    assert journal.written() >= written
    journal.claim(2)
    with pytest.raises(FencedOffError):
        journal.note({}, 1)
    assert journal.head().notes == {"keep": 1}


def test_an_older_token_appends_nothing_once_a_newer_one_claimed(journal: Journal) -> None:
    journal.claim(1)
    journal.append({"by": 1}, 1)
    journal.claim(2)
    for attempt in (lambda: journal.append({"by": 1}, 1), lambda: journal.claim(1)):
        with pytest.raises(FencedOffError, match="history of chat is no longer ours: its attempt 2"):
            attempt()
    assert [entry["by"] for entry in journal.entries()] == [1]


def test_a_writer_stopped_before_the_swap_leaves_nothing_that_counts(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.claim(1)
    whole = Journal._swap

    def overtaken(self: Journal, head: Head, other: Head) -> bool:
        monkeypatch.setattr(Journal, "_swap", whole)
        journal.claim(2)
        journal.append({"by": 2}, 2)
        return whole(self, head, other)

    monkeypatch.setattr(Journal, "_swap", overtaken)
    with pytest.raises(FencedOffError):
        journal.append({"by": 1}, 1)
    assert [entry["by"] for entry in journal.entries()] == [2]


def test_of_many_that_append_with_one_token_each_entry_is_there_or_refused(journal: Journal) -> None:
    journal.claim(1)
    there: list[int] = []

    def append(number: int) -> None:
        try:
            journal.append({"number": number}, 1)
        except FencedOffError:
            return
        there.append(number)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["number"] for entry in journal.entries()) == sorted(there)
    assert there
