"""The knapsack against every assignment there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sweep.knapsack import Option, allocations

WIDTHS = (2, 4, 8)
losses = st.one_of(st.just(0.0), st.floats(1e-6, 2.0), st.sampled_from([0.25, 0.5]))
modules = st.lists(st.tuples(st.integers(1, 50), st.tuples(losses, losses, losses)), min_size=1, max_size=4)


def options_of(drawn):
    return {
        f"m{i}": {bits: Option(bits * size, loss) for bits, loss in zip(WIDTHS, of, strict=True)}
        for i, (size, of) in enumerate(drawn)
    }


def smallest(options):
    return sum(min(option.bytes for option in of.values()) for of in options.values())


def every_assignment(options, limit):
    """(loss, bytes) of all that fit, the least loss first, then the fewest bytes."""
    found = []
    for chosen in itertools.product(*(of.values() for of in options.values())):
        if (size := sum(option.bytes for option in chosen)) <= limit:
            found.append((sum(option.loss for option in chosen), size))
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(modules, st.floats(0.9, 4.2), st.integers(1, 6))
def test_the_best_few_are_those_of_a_full_search(drawn, share, count):
    options = options_of(drawn)
    limit = int(share * smallest(options))
    expected = every_assignment(options, limit)
    found = list(itertools.islice(allocations(options, limit), count))
    assert len(found) == min(count, len(expected))
    chosen = [[options[name][bits] for name, bits in widths.items()] for widths in found]
    assert [sum(option.loss for option in of) for of in chosen] == pytest.approx(
        [loss for loss, _ in expected[: len(found)]], rel=1e-6, abs=1e-8
    )
    assert all(widths.keys() == options.keys() for widths in found)
    assert all(sum(option.bytes for option in of) <= limit for of in chosen)
    assert len({tuple(sorted(widths.items())) for widths in found}) == len(found)


def test_all_assignments_are_given_once_and_then_no_more():
    options = options_of([(3, (0.9, 0.2, 0.0)), (5, (0.5, 0.3, 0.1))])
    assert len(list(allocations(options, 10**6))) == 9
    assert list(allocations(options, smallest(options) - 1)) == []


def test_of_equal_losses_the_fewer_bytes_come_first_and_the_order_of_modules_does_not_show():
    options = options_of([(7, (0.5, 0.5, 0.5)), (3, (0.25, 0.25, 0.0))])
    first = next(allocations(options, 10**6))
    assert first == {"m0": 2, "m1": 8}
    shuffled = {name: dict(reversed(of.items())) for name, of in reversed(options.items())}
    many = [list(itertools.islice(allocations(o, 60), 5)) for o in (options, shuffled)]
    assert many[0] == many[1]
