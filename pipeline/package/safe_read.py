"""Strict reading of what comes from outside: JSON without doubt about its meaning, tensors without a second copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

MOST_JSON_BYTES = 16 * 2**20


def read_json(data: bytes) -> Any:
    """Parse JSON. Raises ValueError for over 16 MiB, other than UTF-8, duplicate keys, or bottomless nesting."""
    if len(data) > MOST_JSON_BYTES:
        raise ValueError(f"more than {MOST_JSON_BYTES} bytes of JSON")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def read_json_file(path: Path) -> Any:
    """Parse a JSON file. Raises ValueError as `read_json` does, before more than that is read."""
    with open(path, "rb") as file:
        return read_json(file.read(MOST_JSON_BYTES + 1))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return fields


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file without a copy. Raises ValueError for a header too large, ambiguous or untrue."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_JSON_BYTES, path.stat().st_size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
        read_json(file.read(length))
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not tensors as safetensors describes them: {error}") from error
