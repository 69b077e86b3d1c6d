"""Intervals of a ratio of sums over documents, by a bootstrap: what other documents of the kind would have said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


def ratio_interval(
    sums: Sequence[float] | NDArray[np.float64], weights: Sequence[float] | NDArray[np.float64], confidence: float
) -> tuple[float, float] | None:
    """Return the two-sided interval (Efron's percentiles) of sum(sums) / sum(weights), which belong to the same
    documents and are drawn together; None: fewer than two documents, or the sums are all zero."""
    from scipy import stats  # takes a second, which a tick without new data has no use for

    sums, weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    if len(weights) < 2 or not sums.any():
        return None

    def ratio(drawn: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        drawn_ratio: NDArray[np.float64] = drawn.sum(axis) / counts.sum(axis)
        return drawn_ratio

    drawn = stats.bootstrap(
        (sums, weights),
        ratio,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=RESAMPLES // 20,  # all at once take 50 kB a document
        method="percentile",
        rng=0,
    )
    low, high = drawn.confidence_interval
    return float(low), float(high)
