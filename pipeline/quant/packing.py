"""Codes to bytes and back, without loss.

Rows are packed one by one and padded to a whole byte, so that a row can be read alone. `dense` holds b bits a code,
offset by 2^(b-1), the first code in the lowest bits; `base3` holds five ternary codes a byte (3^5 = 243), the first
in the lowest digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quant.spec import Encoding, Grid, Levels, grid

TERNARY_PER_BYTE = 5


def encoding_of(bits: int, encoding: Encoding) -> Encoding:
    """Return how codes of a width are packed in a package of an encoding: base3 holds its 2-bit codes alone."""
    return encoding if bits == 2 else "dense"


def packed_columns(columns: int, bits: int, encoding: Encoding = "dense") -> int:
    """Count the bytes of one packed row."""
    return -(-columns // codes_per_byte(bits, encoding))


def pack(codes: Tensor, bits: int, encoding: Encoding = "dense", levels: Levels = "symmetric") -> Tensor:
    """Pack (rows, columns) int8 codes into (rows, packed_columns) uint8. Raises ValueError for a code outside the grid,
    or a grid that the encoding cannot hold."""
    base, offset, per_byte = _digits(bits, encoding, levels)
    if codes.ndim != 2:
        raise ValueError(f"codes of shape {tuple(codes.shape)} are not a matrix")
    _check(codes, grid(levels, bits), bits)
    digits = codes.contiguous().view(torch.uint8) + offset  # a negative code wraps around to its digit
    digits = torch.nn.functional.pad(digits, (0, -codes.shape[1] % per_byte)).reshape(len(codes), -1, per_byte)
    packed = digits[..., 0].clone()
    for place in range(1, per_byte):
        packed += digits[..., place] * base**place
    return packed


def unpack(
    packed: Tensor, columns: int, bits: int, encoding: Encoding = "dense", levels: Levels = "symmetric"
) -> Tensor:
    """Unpack (rows, packed_columns) uint8 into (rows, columns) int8 codes. Raises ValueError if the shape does not fit,
    a code lies outside the grid, or the padding is not zero."""
    base, offset, per_byte = _digits(bits, encoding, levels)
    if packed.ndim != 2 or packed.shape[1] != packed_columns(columns, bits, encoding):
        raise ValueError(
            f"packed bytes of shape {tuple(packed.shape)} do not hold rows of {columns} codes ({bits} bits, {encoding})"
        )
    values = torch.arange(256, dtype=torch.int16).unsqueeze(-1)
    places = base ** torch.arange(per_byte, dtype=torch.int16)
    table = ((values // places) % base - offset).to(torch.int8)  # (256, per_byte): what each byte stands for
    padded = table.index_select(0, packed.flatten().int()).reshape(packed.shape[0], -1)
    codes, padding = padded[:, :columns], padded[:, columns:]
    _check(codes, grid(levels, bits), bits)
    if (padding != -offset).any() or (encoding == "base3" and packed.numel() and int(packed.max()) >= 3**5):
        raise ValueError("the packed bytes hold values that no codes give")
    return codes.contiguous()


def codes_per_byte(bits: int, encoding: Encoding) -> int:
    """Count the codes that a byte holds. Raises ValueError for a width that the encoding does not take."""
    if encoding == "base3":
        if bits != 2:
            raise ValueError(f"encoding base3 holds ternary codes (2 bits), not {bits} bits; valid: dense")
        return TERNARY_PER_BYTE
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits cannot be packed; valid: 2, 4, 8")
    return 8 // bits


def _check(codes: Tensor, grid: Grid, bits: int) -> None:
    if codes.numel() and (int(codes.min()) < grid.low or int(codes.max()) > grid.high):
        extremes = f"{int(codes.min())}..{int(codes.max())}"
        raise ValueError(f"codes {extremes} lie outside the {bits}-bit grid {grid.low}..{grid.high}")


def _digits(bits: int, encoding: Encoding, levels: Levels) -> tuple[int, int, int]:
    per_byte = codes_per_byte(bits, encoding)
    if encoding == "base3" and not grid(levels, bits).ternary:
        raise ValueError(f"encoding base3 holds ternary codes, not {levels} ones; valid: dense")
    return (3, 1, per_byte) if encoding == "base3" else (2**bits, 2 ** (bits - 1), per_byte)
