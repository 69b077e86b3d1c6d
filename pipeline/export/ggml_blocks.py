"""Codes in the block types of GGML, without loss but for the rounding of the scale to fp16.

Every level (code + shift) * scale is written as a whole number times one fp16 scale, whatever the block; the scale of a
row, or of a group of neighbours, becomes equal scales in its blocks. Groups have at most 128, so that a block of 256
lies in none.

| grid              | type of rows in multiples of 256       | of 32, or in groups          |
|-------------------|----------------------------------------|------------------------------|
| ternary           | TQ2_0: q - 1                           | Q4_0: q - 8                  |
| -2..1             | TQ2_0 with a negative scale: 1 - q     | Q4_0                         |
| midpoint, 2 bits  | Q2_K: (2q - 3) * scale / 2             | Q4_0: odd numbers, scale / 2 |
| 4 bits            | Q4_0                                   | Q4_0                         |
| midpoint, 4 bits  | Q4_K: (2q - 15) * scale / 2            | Q8_0: odd numbers, scale / 2 |
| 8 bits            | Q8_0                                   | Q8_0                         |

Midpoint grids of 8 bits need nine (odd numbers to 255) and have no type; neither have rows of other lengths. Q2_0, 64
numbers of 2 bits after their scale, would halve ternary groups of 64 and 128: llama.cpp has it, the `gguf` package that
reads back what is written does not (0.19.0).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.quant.spec import Grid

Bytes = NDArray[np.uint8]
Packer = Callable[[NDArray[np.int16], NDArray[np.float32]], Bytes]
SMALLEST_NORMAL, LARGEST = 6.104e-5, 65504.0  # of fp16


class NoBlockError(ValueError):
    """No block type holds what is to be packed; the message says why."""


def pack_blocks(codes: NDArray[np.int8], scale: NDArray[np.float32], grid: Grid, bits: int) -> tuple[str, Bytes]:
    """Return the block type's name and the bytes (rows, bytes of a row) of codes (rows, columns) and their scales
    (rows, groups of a row). Raises NoBlockError because of the levels, the length of the rows, or a scale."""
    rows, columns = codes.shape
    chosen = _packer(grid, bits, columns, grouped=scale.shape[1] > 1)
    if chosen is None:
        raise NoBlockError(f"no block type holds levels {grid.low} to {grid.high} of {bits} bits in rows of {columns}")
    name, pack = chosen
    stored = scale.astype(np.float32) * (0.5 if grid.shift else 1.0)
    outside = (stored != 0) & ((stored < SMALLEST_NORMAL) | (stored > LARGEST))
    if outside.any():  # fp16 would round it by more than its eleven bits
        raise NoBlockError(f"{name} has scales of fp16, which does not hold {float(stored[outside][0]):.3g}")
    return name, pack(codes.astype(np.int16), stored.astype(np.float32)).reshape(rows, -1)


def _packer(grid: Grid, bits: int, columns: int, grouped: bool) -> tuple[str, Packer] | None:
    if columns % 32:
        return None
    wide = columns % 256 == 0 and not grouped
    if grid.shift:
        choices: dict[int, tuple[str, Packer]] = {
            2: ("Q2_K", _q2_k) if wide else ("Q4_0", lambda codes, scale: _q4_0(2 * codes + 1, scale)),
            4: ("Q4_K", _q4_k) if wide else ("Q8_0", lambda codes, scale: _q8_0(2 * codes + 1, scale)),
        }
        return choices.get(bits)
    if bits == 2 and wide:
        return ("TQ2_0", _tq2_0) if grid.ternary else ("TQ2_0", lambda codes, scale: _tq2_0(-codes, -scale))
    return {2: ("Q4_0", _q4_0), 4: ("Q4_0", _q4_0), 8: ("Q8_0", _q8_0)}[bits]


def _q8_0(numbers: NDArray[np.int16], scale: NDArray[np.float32]) -> Bytes:
    """Pack 32 numbers -128..127 after their scale."""
    blocks = numbers.astype(np.int8).reshape(-1, 32).view(np.uint8)
    return np.concatenate([_half(scale, numbers.size // 32), blocks], axis=1)


def _q4_0(numbers: NDArray[np.int16], scale: NDArray[np.float32]) -> Bytes:
    """Pack 32 numbers -8..7 after their scale; the low nibbles are the first sixteen."""
    digits = (numbers + 8).astype(np.uint8).reshape(-1, 2, 16)
    return np.concatenate([_half(scale, numbers.size // 32), digits[:, 0] | digits[:, 1] << 4], axis=1)


def _tq2_0(numbers: NDArray[np.int16], scale: NDArray[np.float32]) -> Bytes:
    """Pack 256 numbers -1..2 before their scale."""
    return np.concatenate([_crumbs(numbers + 1), _half(scale, numbers.size // 256)], axis=1)


def _q2_k(codes: NDArray[np.int16], scale: NDArray[np.float32]) -> Bytes:
    """Pack sixteen scales and minima of 4 bits, 256 digits, the unit of the scales, that of the minima: 2 * q - 3."""
    blocks = codes.size // 256
    half = _half(scale, blocks)
    factors = np.full((blocks, 16), 2 | 3 << 4, np.uint8)
    return np.concatenate([factors, _crumbs(codes + 2), half, half], axis=1)


def _q4_k(codes: NDArray[np.int16], scale: NDArray[np.float32]) -> Bytes:
    """Pack two units, eight scales and minima of 6 bits, 256 digits: 2 * q - 15."""
    blocks = codes.size // 256
    half = _half(scale, blocks)
    factors = np.tile(np.array([2] * 4 + [15] * 4 + [2 | (15 << 4 & 0xF0)] * 4, np.uint8), (blocks, 1))
    digits = (codes + 8).astype(np.uint8).reshape(blocks, 4, 2, 32)
    return np.concatenate([half, half, factors, (digits[:, :, 0] | digits[:, :, 1] << 4).reshape(blocks, 128)], axis=1)


def _crumbs(digits: NDArray[np.int16]) -> Bytes:
    """Pack 256 digits 0..3 in 64 bytes: of each 128, byte i holds the digits i, i + 32, i + 64 and i + 96."""
    parts = digits.astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return packed.reshape(-1, 64).astype(np.uint8)


def _half(scale: NDArray[np.float32], blocks: int) -> Bytes:
    """Return the two bytes of the scale of each of so many blocks in all, (blocks, 2)."""
    return np.repeat(scale.astype(np.float16).reshape(-1, 1), blocks // scale.size, axis=0).view(np.uint8)
