"""Intervals over documents: against a bootstrap of our own, paired, and the same from a file."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.bench.documents import DIGITS, Documents, averaged, bootstrapped, read_documents, written

LEFT, RIGHT = ("best", "2-2-8"), ("paper", "2-2-8")


def scored(gap, seed=0, documents=120, noise=0.02):
    """Documents of 5 to 200 tokens, hard or easy for teacher and student alike; the longer, the larger the gap."""
    text, own = np.random.default_rng(99), np.random.default_rng(seed)
    tokens = text.integers(5, 200, documents)
    teacher = tokens * text.normal(3.0, 1.0, documents).clip(0.5)
    student = teacher * (1 + gap) + tokens * (tokens / 200 * gap + own.normal(0, noise, documents))
    return Documents(tokens=tokens.tolist(), teacher=teacher.tolist(), student=student.tolist())


def drawn_by_hand(left, right, resamples=4000):
    """Return the ends between which 95 of 100 redrawn test splits have their difference."""
    random, documents = np.random.default_rng(12345), len(left.tokens)
    differences = []
    for _ in range(resamples):
        chosen = random.choice(documents, documents)
        tokens = sum(left.tokens[index] for index in chosen)
        differences.append(sum(left.student[index] - right[index] for index in chosen) / tokens)
    return np.percentile(differences, [2.5, 97.5])


@pytest.mark.parametrize("against", [None, scored(0.05, seed=1)], ids=["teacher", "student"])
def test_an_interval_holds_what_other_documents_would_have_said(against):
    left = scored(0.03)
    low, high = bootstrapped(left, against)
    expected = drawn_by_hand(left, left.teacher if against is None else against.student)
    assert (low, high) == pytest.approx(expected, abs=0.08 * (high - low))  # four times the noise of an end
    others = left.teacher if against is None else against.student
    assert low < (sum(left.student) - sum(others)) / sum(left.tokens) < high
    assert bootstrapped(left, against) == (low, high)


def test_both_sides_read_the_same_documents():
    """Documents differ far more than two students do on one of them."""
    left, right = scored(0.03, noise=0.001), scored(0.03, seed=1, noise=0.001)
    (low, high), alone = bootstrapped(left, right), [bootstrapped(side) for side in (left, right)]
    unpaired = np.hypot(*(end - start for start, end in alone))
    assert high - low < unpaired / 10
    assert bootstrapped(right, left) == pytest.approx((-high, -low))


def test_equal_sides_or_one_document_have_no_interval():
    left = scored(0.03)
    assert bootstrapped(left, left) is bootstrapped(scored(0.03, documents=1)) is None
    assert bootstrapped(left.model_copy(update={"student": left.teacher})) is None
    assert bootstrapped(scored(0.03, documents=2)) is not None


def test_nats_are_averaged_over_seeds():
    seeds, other = [scored(0.03, seed) for seed in range(3)], scored(0.1)
    rows = averaged([(LEFT, seeds[0]), (RIGHT, other), (LEFT, seeds[1]), (LEFT, seeds[2])])
    assert list(rows) == [LEFT, RIGHT]
    assert (rows[LEFT].tokens, len(rows[LEFT].student)) == (other.tokens, 120)
    expected = np.mean([of_seed.student for of_seed in seeds], axis=0)
    assert rows[LEFT].student == pytest.approx(expected, abs=10**-DIGITS)
    assert rows[LEFT].teacher == pytest.approx(other.teacher, abs=10**-DIGITS)
    assert rows[RIGHT].student == pytest.approx(other.student, abs=10**-DIGITS)


def test_a_file_holds_what_the_table_was_made_of():
    rows = averaged([(LEFT, scored(0.03)), (RIGHT, scored(0.1)), (("best", "4-4-8"), scored(0.01))])
    text = written(rows)
    assert read_documents(text) == rows  # so a table made piece by piece is that made at once
    assert written(read_documents(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"tokens": [1], "teacher": [1.0], "rows": [{}]}', '{"tokens": "", "teacher": [], "rows": [0]}'],
)
def test_what_is_no_such_file_is_refused(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_documents(text)
