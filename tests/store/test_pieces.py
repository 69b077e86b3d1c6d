"""Pieces of work that an attempt which takes over need not make again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store.pieces import Pieces
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
