"""Frozen tensors to the tensors of a file and back, without loss.

Packed rows lie one after the other, flat: no plain loader can take 8-bit codes for the weights they stand for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.config.quant import Quant
from pipeline.errors import DamagedError
from pipeline.models.family import family_for
from pipeline.models.student import check_tensors
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.granularity import Granularity
from pipeline.quant.packing import encoding_of, pack, packed_columns, unpack
from pipeline.quant.spec import Encoding, Levels, QuantSpec, grid

NOT_DAMAGE = (MemoryError, ImportError)  # of this machine, not of the package
NO_MEMORY = "can't allocate memory"  # of torch's RuntimeError, which has no type of its own on a CPU
SHIPPED = (torch.float32, torch.float16, torch.bfloat16)  # types of scales and of what is not quantized
SPARED = ("final_logits_bias",)  # BART's: not stored while zero, and yet frozen, so that the digest is the same


@contextlib.contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Raise DamagedError for whatever transformers meets in a package while inside; MemoryError for lack of memory."""
    try:
        yield
    except NOT_DAMAGE:
        raise
    except Exception as error:
        if NO_MEMORY in str(error):
            raise MemoryError(f"{path} needs more memory than there is: {error}") from error
        raise DamagedError(f"{path} is damaged: {error}") from error


def spec_of(
    config: PreTrainedConfig, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> QuantSpec:
    """Return what a package was trained for. Raises DamagedError for tensors that are not its architecture's."""
    with damage_of(path):
        spec = Quant.model_validate(fields["quant"]).spec()
        check_tensors(config, spec, family_for(config.model_type, fields["family"]), shapes)
        return spec


def encode(frozen: FrozenTensors, encoding: Encoding) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the weights file, and what must be known to read them."""
    tensors = {name: tensor.contiguous() for name, tensor in frozen.rest.items()}
    zeros = {name: tensors.pop(name) for name in SPARED if name in tensors and not tensors[name].any()}
    for name, codes in frozen.codes.items():
        bits = frozen.bits[name]
        tensors[f"{name}.weight"] = pack(codes, bits, encoding_of(bits, encoding), frozen.levels).flatten()
        tensors[f"{name}.weight_scale"] = frozen.scales[name].contiguous()
    return tensors, {
        "encoding": encoding,
        "levels": frozen.levels,
        "modules": {n: {"bits": frozen.bits[n], "shape": list(c.shape)} for n, c in sorted(frozen.codes.items())},
        "zeros": {n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for n, t in zeros.items()},
    }


@dataclass(frozen=True)
class Packed:
    """A quantized weight as it lies in the file."""

    codes: Tensor  # (rows, bytes of a row), uint8
    scale: Tensor  # as `Granularity` stores it, finite, zero or more
    bits: int
    columns: int
    encoding: Encoding

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the weight."""
        return len(self.codes), self.columns


def packed_of(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """Return quantized weights by module, still packed, and the other tensors, zeros that were left out among them.
    Raises ValueError, KeyError, TypeError, AttributeError for tensors that are not what the fields say."""
    rest, packed = dict(tensors), {}
    for name, module in fields["modules"].items():
        bits, (rows, columns) = _whole(module["bits"]), map(_whole, module["shape"])
        codes, scale = rest.pop(f"{name}.weight"), rest.pop(f"{name}.weight_scale")
        encoding = encoding_of(bits, fields["encoding"])
        expected = (rows * packed_columns(columns, bits, encoding),)
        if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
            raise ValueError(f"{name}.weight is {codes.dtype} {tuple(codes.shape)}, not {expected[0]} packed bytes")
        Granularity.of_scale(tuple(scale.shape), (rows, columns))
        if scale.dtype not in SHIPPED or not (scale.min() >= 0 and scale.max() < math.inf):  # NaN is neither
            raise ValueError(f"{name}.weight_scale holds scales that are not finite, or below zero")
        packed[name] = Packed(codes.reshape(rows, -1), scale, bits, columns, encoding)
    for name, tensor in rest.items():
        if tensor.dtype not in SHIPPED:
            raise ValueError(f"{name} is {tensor.dtype}, in which no package holds it")
    matrices = [*(weight.codes for weight in packed.values()), *(t for t in rest.values() if t.ndim == 2)]
    longest = max(map(len, matrices), default=0)
    for name, described in fields["zeros"].items():
        if name not in SPARED or name in rest:
            raise ValueError(f"{name!r} is not a tensor that may be left out")
        rest[name] = _zeros(name, described, longest)
    return packed, rest


def levels_in(fields: Mapping[str, Any]) -> Levels:
    """Return the levels of a package's grids. Raises ValueError for unknown ones."""
    levels: Levels = fields["levels"]
    grid(levels, 8)
    return levels


def decode(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> FrozenTensors:
    """Return the frozen tensors again; each is unpacked once its packed bytes are there. Raises as `packed_of` does."""
    packed, rest = packed_of(tensors, fields)
    frozen = FrozenTensors(rest=rest, levels=levels_in(fields))
    for name, weight in packed.items():
        frozen.codes[name] = unpack(weight.codes, weight.columns, weight.bits, weight.encoding, frozen.levels)
        frozen.scales[name], frozen.bits[name] = weight.scale, weight.bits
    return frozen


def _zeros(name: str, described: Mapping[str, Any], longest: int) -> Tensor:
    """Return a tensor that was not stored, no longer than the stored matrices."""
    shape, dtype = [_whole(size) for size in described["shape"]], getattr(torch, described["dtype"])
    if dtype not in SHIPPED:
        raise ValueError(f"{name} is {dtype}, in which no package holds it")
    if math.prod(shape) > longest:
        raise ValueError(f"{name} of shape {shape} is longer than the vocabulary")
    return torch.zeros(shape, dtype=dtype)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number of one or more")
    return value
