"""The k best ways to give each module a width under a limit of bytes: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

SCALE = 1e6  # objectives are scaled so that the solver's absolute tolerances (1e-6) are small beside any difference


@dataclass(frozen=True)
class Option:
    """The cost of a width for a module: bytes, and loss in nats."""

    bytes: int
    loss: float


Options = Mapping[str, Mapping[int, Option]]  # by module and width


def allocations(options: Options, limit_bytes: int) -> Iterator[dict[str, int]]:
    """Yield assignments of a width to every module within the limit, the least loss first, as many as are asked for.

    Losses add up; of equal losses the fewer bytes come first. Each answer is excluded by a cut before the next solve.
    """
    names = sorted(options)
    columns = [(name, bits) for name in names for bits in sorted(options[name])]
    places = [names.index(name) for name, _ in columns], range(len(columns))
    pick = csr_array((np.ones(len(columns)), places), shape=(len(names), len(columns)))
    size = np.array([options[name][bits].bytes for name, bits in columns], dtype=np.float64)
    loss = np.array([options[name][bits].loss for name, bits in columns])
    objective = loss / (loss.max() or 1.0) * SCALE + size / size.max() * 1e-3
    unit = size.max()
    fits = LinearConstraint(size[None] / unit, -np.inf, (limit_bytes + 0.5) / unit)
    cuts: list[np.ndarray] = []
    while True:
        excluded = [LinearConstraint(np.stack(cuts), -np.inf, len(names) - 1)] if cuts else []
        solved = milp(
            objective,
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(pick, 1, 1), fits, *excluded],
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            return
        chosen = solved.x > 0.5
        cuts.append(chosen.astype(np.float64))
        yield {name: bits for (name, bits), taken in zip(columns, chosen, strict=True) if taken}
