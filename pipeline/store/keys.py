"""Identity: one canonical encoding, one key function. Never place, time or luck."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from pydantic import BaseModel

KEY_DIGITS = 32


def step_key(stage: str, version: int, recipe: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return the key of a step: 32 hex digits over stage, stage version, recipe and the keys of its inputs."""
    identity = {"stage": stage, "version": version, "recipe": recipe, "inputs": inputs}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:KEY_DIGITS]


def canonical_json(value: Any) -> str:
    """Return JSON with one spelling for equal values. Raises TypeError with the path to a NaN, a set, an object."""
    _refuse(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def recipe_of(section: BaseModel) -> dict[str, Any]:
    """Return the fields of a configuration section as they enter a key."""
    return section.model_dump(mode="json")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return readable lines, one for each leaf in which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return lines
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: key {key!r} is not a string and has no canonical form")
            _refuse(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{path}: {value} has no canonical form")
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise TypeError(f"{path}: {type(value).__name__} has no canonical form")
