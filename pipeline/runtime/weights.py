"""The weights of a package as ONNX Runtime's low-bit kernels want them, without unpacking a code.

A dense package holds the kernels' own bytes: b bits a code, offset by 2^(b-1), the first code in the lowest bits. What
is left is to cut rows into blocks, to give each block its row's or group's scale, to turn `base3` into 2 bits a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline.errors import DamagedError
from pipeline.package import manifest
from pipeline.package.codec import Packed, levels_in, packed_of, spec_of
from pipeline.package.package import configuration
from pipeline.package.safe_read import read_tensors
from pipeline.quant.granularity import Granularity
from pipeline.quant.packing import codes_per_byte, unpack
from pipeline.quant.spec import Levels, QuantSpec, grid

BLOCKS = (128, 64, 32)  # MatMulNBits computes in 8 bits; with others it unpacks each call, 100 times slower
ROWS_AT_ONCE = 2048
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A quantized weight (rows, columns): w = (code - 2^(bits-1) + shift) * scale of the block."""

    data: Bytes  # (rows, blocks, bytes of a block)
    scales: Floats  # (rows, blocks), of one row all the same unless `grouped`
    bits: int
    columns: int
    shift: float
    grouped: bool = False

    @property
    def block(self) -> int:
        """Count the codes of a block."""
        return int(self.data.shape[2]) * 8 // self.bits


@dataclass(frozen=True)
class Weights:
    """Quantized matrices by module name, every other tensor by its own, in fp32."""

    matrices: dict[str, Matrix]
    rest: dict[str, Floats]


def read_weights(folder: Path) -> tuple[Weights, PreTrainedConfig, QuantSpec]:
    """Return the weights, the configuration and the spec it was trained for, every byte checked. Raises DamagedError
    for files that differ from the manifest, or tensors from the configuration, RunError for a newer format."""
    manifest.check(folder)
    config, quantization = configuration(folder)
    path = folder / manifest.WEIGHTS
    try:
        packed, rest = packed_of(read_tensors(path), quantization)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": weight.shape for name, weight in packed.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in rest.items()}
        spec = spec_of(config, quantization, shapes, folder)
        levels = levels_in(quantization)
        matrices = {name: _matrix(weight, levels) for name, weight in packed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} does not hold what its config.json says: {error}") from error
    return Weights(matrices, {name: tensor.float().numpy() for name, tensor in rest.items()}), config, spec


def _matrix(packed: Packed, kind: Levels) -> Matrix:
    levels, codes = grid(kind, packed.bits), packed.codes.numpy()
    bits, columns = packed.bits, packed.columns
    granularity = Granularity.of_scale(tuple(packed.scale.shape), packed.shape)
    grouped = granularity.kind == "per_group"
    whole = granularity.group_size if grouped else columns  # a block lies in one group
    block = next((size for size in BLOCKS if whole % size == 0), BLOCKS[-1])
    blocks = -(-columns // block)
    if packed.encoding == "dense" and levels.low > -(1 << bits - 1):
        _refuse_lowest_code(codes, bits, columns)
    per_byte = codes_per_byte(bits, packed.encoding)
    if columns % per_byte:  # for what it refuses behind a row's end
        unpack(packed.codes[:, -1:], columns % per_byte, bits, packed.encoding, kind)
    dense = _two_bits(codes) if packed.encoding == "base3" else codes
    wanted = blocks * block * bits // 8
    if dense.shape[1] != wanted:  # where a block, or a byte of base3, ends behind the row, nothing is read
        dense = np.pad(dense[:, :wanted], ((0, 0), (0, max(0, wanted - dense.shape[1]))))
    data = np.ascontiguousarray(dense).reshape(len(codes), blocks, -1)
    scales = granularity.block_scales(packed.scale.float(), packed.shape, blocks).numpy()
    return Matrix(data, scales, bits, columns, levels.shift, grouped)


def _two_bits(packed: Bytes) -> Bytes:
    """Turn rows of five ternary codes a byte into rows of four 2-bit codes a byte; codes behind a row's end stay. Four
    bytes hold twenty codes, which are five bytes of four. A table takes two bytes to 20 bits, and the rows pass in
    small groups, so that little memory is needed."""
    if packed.size and int(packed.max()) >= 3**5:
        raise ValueError("a byte of base3 is above 242")
    digits = np.arange(256)[:, None] // 3 ** np.arange(5) % 3 + 1  # (256, 5), 1 to 3: codes offset by 2
    ten_bits = (digits << 2 * np.arange(5)).sum(1).astype(np.uint32)
    table = (ten_bits | ten_bits[:, None] << np.uint32(10)).reshape(-1)  # by first byte + 256 * second byte
    rows, width = packed.shape
    dense = np.empty((rows, -(-width // 4) * 5), np.uint8)
    for start in range(0, rows, ROWS_AT_ONCE):
        chunk = np.pad(packed[start : start + ROWS_AT_ONCE], ((0, 0), (0, -width % 4)))
        halves = table[chunk.view("<u2")].reshape(len(chunk), -1, 2).astype("<u8")
        words = halves[..., 0] | halves[..., 1] << np.uint64(20)
        five = words.view(np.uint8).reshape(len(chunk), -1, 8)[:, :, :5]
        dense[start : start + len(chunk)] = five.reshape(len(chunk), -1)
    return dense


def _refuse_lowest_code(packed: Bytes, bits: int, columns: int) -> None:
    """Raise ValueError for the lowest code, all of whose digits are zero: a symmetric grid does not use it."""
    whole = packed[:, : columns * bits // 8]
    lowest = np.uint8(sum(1 << place for place in range(0, 8, bits)))  # the lowest bit of every code of a byte
    used = whole.copy()
    for shift in range(1, bits):
        used |= whole >> np.uint8(shift)
    if ((used & lowest) != lowest).any():
        raise ValueError("a code lies outside the grid")
