"""Values laid over a configuration, by dotted paths: trials of a sweep, recipes of a tick."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.presets import PRESETS, suited
from pipeline.config.run import Config
from pipeline.errors import ConfigError

FIXED = ("name", "preset", "resources", "sweep", "retrain")  # of the project, or without influence on a result
LONGEST = 24  # characters of a mapping on the line that says what was laid over


def laid_over(base: Config, values: dict[str, Any]) -> Config:
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
        raise ConfigError(f"{label(values)} is impossible: {field + ': ' if field else ''}{reason}") from error


def unfilled(base: Config) -> dict[str, Any]:
    """Return a configuration's fields, which its preset can fill anew, as suits other widths or another quantizer."""
    fields = base.model_dump(mode="json", by_alias=True, exclude={"sweep", "retrain"})
    preset = PRESETS[base.preset] if base.preset else {}
    for name, values in suited(preset, base.quant.bits, base.task.name).items():
        section = getattr(base, name)
        fields[name] = {k: v for k, v in fields[name].items() if k not in values or getattr(section, k) != values[k]}
    return fields


def label(values: dict[str, Any]) -> str:
    """Return values on one line, for people."""
    parts = []
    for path, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        if len(text) > LONGEST and isinstance(value, dict):
            text = f"{{{len(value)} entries}}"
        parts.append(f"{path.rpartition('.')[2]}={text}")
    return " ".join(parts) or "as configured"


def check_path(path: str, knob: str) -> None:
    """Raise ConfigError, naming the knob, for a path that is none of a configuration's, or fixed for all its runs."""
    section: type[BaseModel] | None = Config
    for depth, part in enumerate(path.split(".")):
        if section is None:  # a mapping of free keys, such as an architecture's
            return
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        valid = sorted(set(fields) - set(FIXED)) if depth == 0 else sorted(fields)
        if part not in valid:
            raise ConfigError(
                f"{knob}: {path!r} is no path of the configuration at {part!r}; valid: {', '.join(valid)}"
            )
        field = fields[part]
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        free = any(getattr(k, "__origin__", None) is dict for k in kinds)
        if section is None and not free and depth < path.count("."):
            raise ConfigError(f"{knob}: {path!r} goes below {part!r}, which is a value")
