"""Trials of a sweep before they run: values laid over a configuration, drawn or enumerated, and what they score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from pipeline.config.laid_over import check_path
from pipeline.config.run import Config
from pipeline.config.sweep import Between, Sweep
from pipeline.errors import ConfigError
from pipeline.metrics import gap_nats, minimised, objectives
from pipeline.store.keys import canonical_json

START = "distill.start"
DRAWS_A_SAMPLE = 20  # tries to draw what was not drawn before, where few values are offered


def check_sweep(config: Config) -> Sweep:
    """Return the section `sweep`. Raises ConfigError if there is none, an unknown path, or a metric the task lacks."""
    sweep = config.sweep
    if sweep is None:
        raise ConfigError(
            "The configuration has no section sweep; add one, such as sweep: {space: {quant.bits: [2-2-8, 4-4-8]}}"
        )
    for path in sweep.space:
        check_path(path, "sweep.space")
    offered = objectives(config.task.name)
    for name in sweep.objectives:
        if name not in offered:
            raise ConfigError(
                f"sweep.objectives: no trial of the task {config.task.name} reports {name!r}; valid: "
                f"{', '.join(offered)}"
            )
    if sweep.asha is not None and config.resources.workers == 0:
        raise ConfigError("sweep.asha stops trials that run side by side on Ray; set resources.workers to 1 or more")
    return sweep


def naming_versions(sweep: Sweep, version_of: Callable[[str], str]) -> Sweep:
    """Return a sweep in whose space each value of `distill.start` names a version: an alias may move before all trials
    have run, and trials are known by their values."""

    def named(path: str, value: Any) -> Any:
        if path == "distill" and isinstance(value, dict) and "start" in value:
            return {**value, "start": named(START, value["start"])}
        return version_of(value) if path == START and isinstance(value, str) else value

    lists = {path: [named(path, v) for v in values] for path, values in sweep.space.items() if isinstance(values, list)}
    return sweep.model_copy(update={"space": {**sweep.space, **lists}})


def listed(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the values of all trials of a grid, or of a random search: a function of seed and index."""
    if sweep.search == "grid":
        return sweep.grid()
    distinct: dict[str, dict[str, Any]] = {}
    for index in range((sweep.samples or 0) * DRAWS_A_SAMPLE):
        values = drawn(sweep, index)
        distinct.setdefault(canonical_json(values), values)
        if len(distinct) == sweep.samples:
            break
    return list(distinct.values())


def drawn(sweep: Sweep, index: int) -> dict[str, Any]:
    """Draw a value for each path, by hash."""
    return {path: _drawn(values, f"{sweep.seed}/{index}/{path}") for path, values in sweep.space.items()}


def _drawn(values: list[Any] | Between, name: str) -> Any:
    share = int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13
    return values.at(share) if isinstance(values, Between) else values[int(share * len(values))]


def scores(
    names: tuple[str, ...], teacher: dict[str, float], student: dict[str, float], packed_bytes: int
) -> tuple[float, ...]:
    """Return a trial's objectives, each to be minimised, from the metrics of one split."""
    known = {**student, "gap": gap_nats(teacher, student), "bytes": float(packed_bytes)}
    return tuple(minimised(name, known[name]) for name in names)
