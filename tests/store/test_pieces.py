"""Pieces of work that an attempt which takes over need not make again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.store.objects import open_objects
from pipeline.store.pieces import Pieces
from pipeline.store.records import Checksum
from pipeline.store.step_store import StepDir


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[StepDir]:
    """One attempt after the other at one step."""

    def attempt() -> Iterator[StepDir]:
        while True:
            with StepDir(str(tmp_path / "store"), "cache", "0" * 32, str(tmp_path)).hold(False, print) as held:
                yield held

    return attempt()


def test_each_piece_is_as_the_newest_attempt_wrote_it(attempts: Iterator[StepDir]) -> None:
    first = Pieces(next(attempts), "parts/")
    assert first.get("a") is None
    first.put("a", [1])
    first.put("b", {"x": 2.5})
    assert first.get("a") == [1]
    second = Pieces(next(attempts), "parts/")
    second.put("a", [3])
    third = Pieces(next(attempts), "parts/")
    assert (third.get("a"), third.get("b"), third.get("c")) == ([3], {"x": 2.5}, None)
    assert third.all() == [[3], {"x": 2.5}]


def test_what_an_attempt_settled_stands_whatever_an_attempt_before_still_writes(attempts: Iterator[StepDir]) -> None:
    first = next(attempts)
    Pieces(first, "parts/").put("a", [1])
    Pieces(first, "parts/").put("b", [1])
    second = next(attempts)
    taken = Pieces(second, "parts/")
    taken.settle()
    taken.put("b", [2])
    store = open_objects(first.storage_uri)
    for name in ("a", "late"):  # by a writer that was stopped after its look at the lease
        store.write(f"cache/{first.key}/1/parts/{name}.json", b"[9]")
    for pieces in (taken, Pieces(second, "parts/"), Pieces(replace(second, fence=None), "parts/")):
        assert (pieces.get("a"), pieces.get("b"), pieces.get("late"), pieces.all()) == ([1], [2], None, [[1], [2]])
    third = Pieces(next(attempts), "parts/")
    third.settle()
    store.write(f"cache/{first.key}/2/parts/b.json", b"[9]")
    assert Pieces(next(attempts), "parts/").all() == third.all() == [[1], [2]]


@pytest.mark.parametrize("other", [b"{}", b"[]", b"7", b'"a"', b'{"bytes": 1, "sha256": []}'])
def test_a_piece_of_another_shape_counts_as_absent(attempts: Iterator[StepDir], other: bytes) -> None:
    step_dir = next(attempts)
    step_dir.write("parts/a.json", other)
    pieces = Pieces(step_dir, "parts/")
    for parse in (Checksum.model_validate, lambda document: document["none"], lambda document: document.none):
        assert pieces.get("a", parse) is None
        assert pieces.all(parse) == []
    pieces.put("a", {"bytes": 1, "sha256": "0"})
    assert pieces.all(Checksum.model_validate) == [Checksum(bytes=1, sha256="0")]


@pytest.mark.parametrize("damaged", [b"", b"{", b"\x00", None])
def test_a_damaged_piece_counts_as_absent(attempts: Iterator[StepDir], damaged: bytes | None) -> None:
    step_dir = next(attempts)
    pieces = Pieces(step_dir, "parts/")
    pieces.put("a", [1])
    if damaged is None:
        step_dir.delete(step_dir.place("parts/a.json"))
    else:
        step_dir.write("parts/a.json", damaged)
    assert pieces.get("a") is None
    assert pieces.all() == []
    pieces.put("a", [2])
    assert pieces.all() == [[2]]
