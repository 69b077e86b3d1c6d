"""The front against brute force, with ties and failed trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sweep.pareto import pareto_front

few = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, -1.5, math.inf, None, math.nan])
anything = st.one_of(st.none(), st.floats(), st.integers(-3, 3))


def tables(value):
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(value, min_size=width, max_size=width), max_size=14)
    )


def by_brute_force(points):
    """Straight from the definition: compare each with each."""
    sound = {n: p for n, p in enumerate(points) if all(v is not None and v == v for v in p)}
    return [
        n
        for n, mine in sound.items()
        if not any(
            all(b <= a for a, b in zip(mine, other, strict=True))
            and any(b < a for a, b in zip(mine, other, strict=True))
            for other in sound.values()
        )
    ]


@settings(max_examples=400, deadline=None)
@given(st.one_of(tables(few), tables(anything)))
def test_the_front_is_the_non_dominated_set(points):
    assert pareto_front(points) == by_brute_force(points)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(3, 1)], [0]),
        ([(1, 3), (2, 2), (3, 1), (3, 3)], [0, 1, 2]),
        ([(1, 2), (1, 2), (1, 3)], [0, 1]),  # equals stay together
        ([(1, None), (2, math.nan), (5, 5)], [2]),  # a trial that failed neither is on the front nor beats
        ([(None, None)], []),
        ([(0.0, 1), (-0.0, 1)], [0, 1]),
        ([(1, math.inf), (2, math.inf)], [0]),
    ],
)
def test_small_cases(points, expected):
    assert pareto_front(points) == expected


def test_points_of_different_widths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        pareto_front([(1, 2), (1,)])
