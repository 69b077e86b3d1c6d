"""What the numbers of a checkpoint are like, read once and a block at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.errors import ConfigError

BLOCK = 2**22  # numbers that are looked at together
NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class Values:
    """What the numbers of a matrix or vector are like. `outlier` is its largest size over the root of its mean square;
    `dead_rows` are those of zeros alone."""

    nans: int
    infinite: int
    outlier: float
    dead_rows: int


def values_of(path: Path) -> dict[str, Values]:
    """Return what each floating-point tensor of a safetensors or GGUF file holds, by its name there; reads the whole
    file once, with memory for a few million numbers. That takes about as long as its checksum, or of GGUF's blocks,
    which are turned into numbers, a second for some 100 million."""
    if path.suffix == ".gguf":
        return {name: _values(blocks) for name, blocks in _in_gguf(path)}
    values = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            blocks = blocks_of(file, name)
            if blocks is not None:
                values[name] = _values(blocks)
    return values


def _in_gguf(path: Path) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """Yield each tensor of a GGUF file that holds any numbers, by name: its rows in blocks of fp32."""
    from gguf import GGUFReader, dequantize

    for tensor in GGUFReader(path).tensors:
        if not tensor.n_elements:
            continue
        rows, kind = tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.tensor_type
        few = max(1, BLOCK * len(rows) // int(tensor.n_elements))
        parts = (rows[start : start + few] for start in range(0, len(rows), few))
        yield tensor.name, (torch.tensor(dequantize(part, kind)) for part in parts)


def remembered_values(remembered: Callable[[Path, str, Callable[[], str]], str], path: Path) -> dict[str, Values]:
    """Return `values_of` a file, by a memo's `remembered`, which finds out once."""

    def find_out() -> str:
        return json.dumps({name: asdict(values) for name, values in values_of(path).items()})

    return {name: Values(**fields) for name, fields in json.loads(remembered(path, "values", find_out)).items()}


def refuse_not_finite(values: Mapping[str, Values], where: Path) -> None:
    """Raise ConfigError for tensors that hold NaN or infinity."""
    broken = {name: value for name, value in values.items() if value.nans or value.infinite}
    if not broken:
        return
    counts = [f"{name} ({value.nans:,} NaN, {value.infinite:,} infinite)" for name, value in sorted(broken.items())]
    raise ConfigError(
        f"model.source: {len(broken)} tensors in {where} hold NaN or infinity: {some_of(counts)}. No training "
        "mends them, and all that is computed from them is NaN. Fetch the checkpoint again, or take an earlier "
        "one; one that was cast to fp16 may have overflowed: cast it from the original to bf16."
    )


def _values(blocks: Iterator[torch.Tensor]) -> Values:
    nans = infinite = dead = count = 0
    largest = squares = 0.0
    for block in blocks:
        rows = block.float()
        size = rows.abs().amax(dim=1)
        if not bool(torch.isfinite(size).all()):
            nans += int(torch.isnan(rows).sum())
            infinite += int(torch.isinf(rows).sum())
            continue
        dead += int((size == 0).sum())
        largest = max(largest, float(size.max()))
        squares += float(rows.square().sum(dtype=torch.float64))
        count += rows.numel()
    scale = (squares / count) ** 0.5 if count else 0.0
    return Values(nans, infinite, largest / scale if scale else 0.0, dead)


def blocks_of(file: Any, name: str) -> Iterator[torch.Tensor] | None:
    """Return the rows of a tensor in blocks; None for one that is empty or holds no floating-point numbers."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if 0 in shape or not re.match("B?F[0-9]", part.get_dtype()):
        return None
    if len(shape) < 2:
        return iter([file.get_tensor(name).reshape(1, -1)])
    rows = max(1, BLOCK * shape[0] // math.prod(shape))
    return (part[start : start + rows].flatten(1) for start in range(0, shape[0], rows))


def some_of(names: Iterable[str]) -> str:
    """Return the first few names, for a message."""
    listed = list(names)
    return ", ".join(listed[:NAMED]) + (" ..." if len(listed) > NAMED else "")
