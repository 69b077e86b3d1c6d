"""The pace of a training job: what a step takes, of that what is waited for rows, and tokens a second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pipeline.store.records import Point


@dataclass
class Pace:
    """Counts since the last restart; `tokens` are of all workers, the seconds of this one."""

    steps: int = 0
    tokens: int = 0
    waited_s: float = 0.0
    _begun: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Count anew, so that validation and checkpoints are not counted."""
        self.steps, self.tokens, self.waited_s, self._begun = 0, 0, 0.0, time.perf_counter()

    def point(self, step: int) -> Point:
        """Return the means over the steps since the restart, as a point of curves."""
        seconds = time.perf_counter() - self._begun
        steps = max(1, self.steps)
        per_step = {"step_s": seconds / steps, "data_wait_s": self.waited_s / steps}
        return {"step": step, **per_step, "tokens_per_s": self.tokens / seconds}
