"""Gauges of what runs, which Ray's own metrics endpoints give to Prometheus, with `ray_` before each name.

They are set in the process that hears how a step goes: a command's own, or that of a trial. Without Ray there are none.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pipeline.store.records import Advance, Point

LABELS = ("run", "stage", "key")  # the configuration's name, the stage, and the first characters of the step's key
KEY_CHARACTERS = 12
RUNNING, DONE, TOTAL = "bitmill_running", "bitmill_done", "bitmill_total"
ADVANCED = "bitmill_last_advance_timestamp_seconds"
OF_POINTS = {  # what points of curves call it: the gauge
    "loss": "bitmill_loss_nats",
    "validation_nats": "bitmill_validation_nats",
    "tokens_per_s": "bitmill_tokens_per_second",
    "step_s": "bitmill_step_seconds",
    "data_wait_s": "bitmill_data_wait_seconds",
    "cache_bytes": "bitmill_cache_bytes",
    "trials_running": "bitmill_trials_running",
    "trials_waiting": "bitmill_trials_waiting",
}
GAUGES = {
    RUNNING: "1 while the step runs, 0 once it has ended.",
    DONE: "Units of the stage that are done: steps, shards, rows or trials.",
    TOTAL: "Units of the stage in all.",
    ADVANCED: "When the step was last heard of, Unix time.",
    OF_POINTS["loss"]: "Loss of the last optimizer step that was read, nats a token.",
    OF_POINTS["validation_nats"]: "Loss on the validation split, nats a token.",
    OF_POINTS["tokens_per_s"]: "Tokens trained on a second, of all workers.",
    OF_POINTS["step_s"]: "Seconds of an optimizer step.",
    OF_POINTS["data_wait_s"]: "Seconds of an optimizer step in which its first worker waited for rows.",
    OF_POINTS["cache_bytes"]: "Bytes of the teacher's states that are stored.",
    OF_POINTS["trials_running"]: "Trials of a sweep that run.",
    OF_POINTS["trials_waiting"]: "Trials of a sweep that are still to start.",
}


@contextlib.contextmanager
def published(run: str, stage: str, key: str, advance: Advance) -> Iterator[Advance]:
    """Yield `advance`, after which the gauges of the step are set too while inside."""
    labels = dict(zip(LABELS, (run, stage, key[:KEY_CHARACTERS]), strict=True))

    def tell(done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
        advance(done, total, note, points)
        values = {OF_POINTS[name]: value for point in points for name, value in point.items() if name in OF_POINTS}
        _set({RUNNING: 1, DONE: done, TOTAL: total, ADVANCED: time.time(), **values}, labels)

    _set({RUNNING: 1, ADVANCED: time.time()}, labels)
    try:
        yield tell
    finally:
        _set({RUNNING: 0}, labels)


def _set(values: dict[str, float], labels: dict[str, str]) -> None:
    ray: Any = sys.modules.get("ray")  # whose import a run without it can spare
    if ray is not None and ray.is_initialized():
        for name, value in values.items():
            _gauge(name).set(value, tags=labels)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, GAUGES[name], tag_keys=LABELS)
