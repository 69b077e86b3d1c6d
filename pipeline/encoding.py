"""Frozen tensors to the tensors of a file and back, without loss.

Packed rows lie one after the other, flat: no plain loader can take 8-bit codes for the weights they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.quant.layers import FrozenTensors
from pipeline.quant.packing import pack, packed_columns, unpack
from pipeline.quant.spec import Encoding, grid

SPARED = ("final_logits_bias",)  # BART's, zero in every model that did not set it: not stored while it is zero


def encode(frozen: FrozenTensors, encoding: Encoding) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the weights file, and what must be known to read them."""
    tensors = {name: tensor.contiguous() for name, tensor in frozen.rest.items()}
    zeros = {name: tensors.pop(name) for name in SPARED if name in tensors and not tensors[name].any()}
    for name, codes in frozen.codes.items():
        bits = frozen.bits[name]
        tensors[f"{name}.weight"] = pack(codes, bits, _encoding_of(bits, encoding), frozen.levels).flatten()
        tensors[f"{name}.weight_scale"] = frozen.scales[name].contiguous()
    return tensors, {
        "encoding": encoding,
        "levels": frozen.levels,
        "modules": {n: {"bits": frozen.bits[n], "shape": list(c.shape)} for n, c in sorted(frozen.codes.items())},
        "zeros": {n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for n, t in zeros.items()},
    }


def decode(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> FrozenTensors:
    """The frozen tensors again. Memory is asked for only once the packed bytes are there that fill it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the tensors are not what the fields say.
    """
    levels = fields.get("levels", "symmetric")  # not in format 1
    grid(levels, 8)  # refuses what is not known
    frozen = FrozenTensors(rest=dict(tensors), levels=levels)
    for name, module in fields["modules"].items():
        bits, (rows, columns) = _whole(module["bits"]), map(_whole, module["shape"])
        packed, scale = frozen.rest.pop(f"{name}.weight"), frozen.rest.pop(f"{name}.weight_scale")
        encoding = _encoding_of(bits, fields["encoding"])
        expected = (rows * packed_columns(columns, bits, encoding),)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise ValueError(f"{name}.weight is {packed.dtype} {tuple(packed.shape)}, not {expected[0]} packed bytes")
        if tuple(scale.shape) not in ((1, 1), (rows, 1)) or not scale.is_floating_point() or not _sound(scale):
            raise ValueError(f"{name}.weight_scale is not one finite scale a matrix or a row, zero or more")
        frozen.codes[name] = unpack(packed.reshape(rows, -1), columns, bits, encoding, frozen.levels)
        frozen.scales[name], frozen.bits[name] = scale, bits
    for name, tensor in fields.get("zeros", {}).items():
        frozen.rest[name] = _zeros(name, tensor, frozen)
    return frozen


def _zeros(name: str, described: Mapping[str, Any], frozen: FrozenTensors) -> Tensor:
    """A tensor that was not stored: one of those that may be, and no longer than some stored matrix has rows."""
    shape, dtype = [_whole(size) for size in described["shape"]], getattr(torch, described["dtype"])
    if name not in SPARED or name in frozen.rest or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a tensor that may be left out")
    stored = [*frozen.codes.values(), *(t for t in frozen.rest.values() if t.ndim == 2)]
    if math.prod(shape) > max(map(len, stored), default=0):
        raise ValueError(f"{name} of shape {shape} is longer than the vocabulary")
    return torch.zeros(shape, dtype=dtype)


def _sound(scale: Tensor) -> bool:
    return bool(torch.isfinite(scale).all() and (scale >= 0).all())


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number of one or more")
    return value


def _encoding_of(bits: int, encoding: Encoding) -> Encoding:
    return encoding if bits == 2 else "dense"
