"""The Pareto front: what nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import starmap
from operator import le


def pareto_front(points: Sequence[Sequence[float | None]]) -> list[int]:
    """Return the indices of the points that no other dominates, every objective minimised.

    One point dominates another if it is nowhere larger and somewhere smaller; so equal points stay together. A point
    with a missing objective (None or NaN, as of a trial that failed) is never on the front and dominates nothing.
    """
    whole = [
        (index, tuple(float(value) for value in point if value is not None))
        for index, point in enumerate(points)
        if all(value is not None and not math.isnan(value) for value in point)
    ]
    best: list[tuple[int, tuple[float, ...]]] = []
    for index, values in sorted(whole, key=lambda entry: entry[1]):  # whoever dominates a point sorts before it
        if not any(other != values and all(starmap(le, zip(other, values, strict=True))) for _, other in best):
            best.append((index, values))
    return sorted(index for index, _ in best)
