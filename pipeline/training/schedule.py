"""Learning rates: a pure function of the step."""

from __future__ import annotations

import math

from pipeline.config.training import Schedule

FINAL_LR = 1e-6  # Tao et al. 2022, appendix: linear decay to 1e-6


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int = 0, schedule: Schedule = "linear") -> float:
    """Return the rate of optimizer step `step` (from 0): linear warm-up to `peak`, then decay to 1e-6 by `schedule`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return peak + (min(FINAL_LR, peak) - peak) * done
