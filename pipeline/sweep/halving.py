"""Asynchronous successive halving that respects bytes: which trials train on after a validation."""

from __future__ import annotations

import numpy as np

from pipeline.config.sweep import Asha


class Halving:
    """Rungs at `grace_steps` optimizer steps and each multiple of it by `reduction_factor`.

    Validation loss ranks a trial at a rung, but only among those that would beat it in every objective if theirs is
    lower: earlier ones of the same teacher, from which gaps and divergences are measured, that are not larger. So no
    trial is stopped for a larger one, and what is best of its size, or smaller, goes on.
    """

    def __init__(self, asha: Asha) -> None:
        self._asha = asha
        self._rungs: dict[int, dict[str, tuple[str, int, float]]] = {}  # by steps, then by trial

    def goes_on(self, key: str, teacher: str, size: int, step: int, nats: float) -> bool:
        """Tell whether a trial trains on that has `nats` of validation loss at `step`: below the first rung, at one
        that it is at already, and if it is among the best one in `reduction_factor` of those it is compared with.

        Args:
            key: of the trial.
            teacher: the key of its teacher.
            size: bytes of its packed weights; the same for all where bytes are no objective.
            step: optimizer steps so far.
            nats: validation loss per token, finite.
        """
        at = self._rung(step)
        if at is None or key in (rung := self._rungs.setdefault(at, {})):
            return True
        rivals = [theirs for other, least, theirs in rung.values() if other == teacher and least <= size]
        rung[key] = teacher, size, nats
        return not rivals or nats <= float(np.quantile(rivals, 1 / self._asha.reduction_factor))

    def _rung(self, step: int) -> int | None:
        """Return the steps of the highest rung reached."""
        if step < self._asha.grace_steps:
            return None
        at = self._asha.grace_steps
        while at * self._asha.reduction_factor <= step:
            at *= self._asha.reduction_factor
        return at
