"""The straight line of stages, as a list of values: text -> tokens -> teacher -> cache -> student -> scores -> package
-> version. Beside it stand stages that only some commands run."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from pipeline.stages import cache, distill, evaluate, finetune, pack, register, sensitivity, tokenize
from pipeline.stages.stage import Stage

LINE: tuple[Stage[Any], ...] = (
    tokenize.STAGE,
    finetune.STAGE,
    cache.STAGE,
    distill.STAGE,
    evaluate.STAGE,
    pack.STAGE,
    register.STAGE,
)
BESIDE: tuple[Stage[Any], ...] = (sensitivity.STAGE,)  # run for a budget of bytes
STAGES: dict[str, Stage[Any]] = {stage.name: stage for stage in (*LINE, *BESIDE)}
SHARED = tuple(stage.name for stage in LINE if stage.shared)


def line_to(name: str) -> tuple[Stage[Any], ...]:
    """Return the line as far as a stage of it."""
    return (*takewhile(lambda stage: stage.name != name, LINE), STAGES[name])
