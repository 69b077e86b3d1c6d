"""Trials of a sweep before they run: values laid over a configuration, drawn or enumerated, and what they score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.presets import PRESETS, suited
from pipeline.config.run import Config
from pipeline.config.sweep import Between, Sweep
from pipeline.errors import ConfigError
from pipeline.metrics import gap_nats, minimised, objectives
from pipeline.store.keys import canonical_json

FIXED = ("name", "preset", "resources", "sweep")  # of the project, or without influence on a result
START = "distill.start"
LONGEST = 24  # characters of a mapping on the line that says a trial's values
DRAWS_A_SAMPLE = 20  # tries to draw what was not drawn before, where few values are offered


def check_sweep(config: Config) -> Sweep:
    """Return the section `sweep`. Raises ConfigError if there is none, an unknown path, or a metric the task lacks."""
    sweep = config.sweep
    if sweep is None:
        raise ConfigError(
            "The configuration has no section sweep; add one, such as sweep: {space: {quant.bits: [2-2-8, 4-4-8]}}"
        )
    for path in sweep.space:
        _check_path(path)
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


def trial_config(base: Config, values: dict[str, Any]) -> Config:
    """Return the base with values at dotted paths; a mapping given for a section is laid over it.

    Raises:
        ConfigError: the combination is impossible; it is named.
    """
    fields = unfilled(base)
    for path, value in values.items():
        *sections, last = path.split(".")
        section = fields
        for name in sections:
            section[name] = section.get(name) or {}
            section = section[name]
        is_section = isinstance(value, dict) and not sections and isinstance(section.get(last), dict)
        section[last] = {**section[last], **value} if is_section else value
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"The trial {label(values)} is impossible: {field + ': ' if field else ''}{reason}"
        ) from error


def unfilled(base: Config) -> dict[str, Any]:
    """Return a configuration's fields, which its preset can fill anew, as suits other widths or another quantizer."""
    fields = base.model_dump(mode="json", by_alias=True, exclude={"sweep"})
    preset = PRESETS[base.preset] if base.preset else {}
    for name, values in suited(preset, base.quant.bits, base.task.name).items():
        section = getattr(base, name)
        fields[name] = {k: v for k, v in fields[name].items() if k not in values or getattr(section, k) != values[k]}
    return fields


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


def label(values: dict[str, Any]) -> str:
    """Return the values of a trial on one line, for people."""
    parts = []
    for path, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        if len(text) > LONGEST and isinstance(value, dict):
            text = f"{{{len(value)} entries}}"
        parts.append(f"{path.rpartition('.')[2]}={text}")
    return " ".join(parts) or "as configured"


def scores(
    names: tuple[str, ...], teacher: dict[str, float], student: dict[str, float], packed_bytes: int
) -> tuple[float, ...]:
    """Return a trial's objectives, each to be minimised, from the metrics of one split."""
    known = {**student, "gap": gap_nats(teacher, student), "bytes": float(packed_bytes)}
    return tuple(minimised(name, known[name]) for name in names)


def _check_path(path: str) -> None:
    section: type[BaseModel] | None = Config
    for depth, part in enumerate(path.split(".")):
        if section is None:  # a mapping of free keys, such as an architecture's
            return
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        valid = sorted(set(fields) - set(FIXED)) if depth == 0 else sorted(fields)
        if part not in valid:
            raise ConfigError(
                f"sweep.space: {path!r} is no path of the configuration at {part!r}; valid: {', '.join(valid)}"
            )
        field = fields[part]
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        free = any(getattr(k, "__origin__", None) is dict for k in kinds)
        if section is None and not free and depth < path.count("."):
            raise ConfigError(f"sweep.space: {path!r} goes below {part!r}, which is a value")
