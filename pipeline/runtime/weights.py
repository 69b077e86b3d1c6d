"""The weights of a package as ONNX Runtime's low-bit kernels want them, without unpacking a code.

A dense package holds the kernels' own bytes: b bits a code, offset by 2^(b-1), the first code in the lowest bits. What
is left to do is to cut rows into blocks and to give every block its row's scale. `base3` bytes are turned into 2 bits a
code by a table, four bytes at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from pipeline import artifact
from pipeline.errors import DamagedError
from pipeline.quant.packing import packed_columns
from pipeline.quant.spec import Encoding, grid
from pipeline.strict import read_tensors

BLOCKS = (128, 64, 32)  # what the 8-bit dot products of MatMulNBits offer; fewer blocks, fewer scales
ROWS_AT_ONCE = 2048
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A quantized weight (rows, columns): w = (code - 2^(bits-1) + shift) * scale of the block."""

    data: Bytes  # (rows, blocks, bytes of a block)
    scales: Floats  # (rows, blocks), of one row all the same
    bits: int
    columns: int
    shift: float

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def block(self) -> int:
        """Codes of a block."""
        return int(self.data.shape[2]) * 8 // self.bits


@dataclass(frozen=True)
class Weights:
    """Quantized matrices by module name, every other tensor by its own, in fp32."""

    matrices: dict[str, Matrix]
    rest: dict[str, Floats]


def read_weights(folder: Path) -> tuple[Weights, PreTrainedConfig, dict[str, Any]]:
    """The weights, the configuration and its quantization_config, every byte checked.

    Raises:
        DamagedError: files that differ from the manifest, or tensors from the configuration. RunError: a newer format.
    """
    artifact.check(folder)
    config, quantization = artifact.configuration(folder)
    try:
        tensors = read_tensors(folder / artifact.WEIGHTS)
        levels, matrices = quantization.get("levels", "symmetric"), {}
        for name, module in quantization["modules"].items():
            bits, (rows, columns) = int(module["bits"]), module["shape"]
            encoding: Encoding = quantization["encoding"] if bits == 2 else "dense"
            width = packed_columns(columns, bits, encoding)
            packed = tensors.pop(f"{name}.weight").reshape(rows, width).numpy()
            scales = tensors.pop(f"{name}.weight_scale").float().numpy()
            matrices[name] = _matrix(packed, scales, bits, columns, encoding, grid(levels, bits).shift)
            if encoding == "dense" and grid(levels, bits).low > -(1 << bits - 1):
                _refuse_lowest_code(packed, bits, columns)
        rest = {name: tensor.float().numpy() for name, tensor in tensors.items() if tensor.is_floating_point()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedError(f"{folder / artifact.WEIGHTS} does not hold what its config.json says: {error}") from error
    return Weights(matrices, rest), config, quantization


def _matrix(packed: Bytes, scales: Floats, bits: int, columns: int, encoding: Encoding, shift: float) -> Matrix:
    rows = len(packed)
    if packed.dtype != np.uint8 or scales.shape not in ((1, 1), (rows, 1)) or not np.isfinite(scales).all():
        raise ValueError(f"a matrix of {rows} rows with bytes {packed.dtype} and scales {scales.shape}")
    block = next((size for size in BLOCKS if columns % size == 0), BLOCKS[-1])
    blocks = -(-columns // block)
    dense = _two_bits(packed) if encoding == "base3" else packed
    wanted = blocks * block * bits // 8
    if dense.shape[1] != wanted:  # where a block, or a byte of base3, ends behind the row, nothing is read
        dense = np.pad(dense[:, :wanted], ((0, 0), (0, max(0, wanted - dense.shape[1]))))
    data = np.ascontiguousarray(dense).reshape(rows, blocks, -1)
    return Matrix(data, np.broadcast_to(scales, (rows, blocks)), bits, columns, shift)


def _two_bits(packed: Bytes) -> Bytes:
    """Rows of five ternary codes a byte to rows of four 2-bit codes a byte; codes behind a row's end stay.

    Four bytes hold twenty codes, which are five bytes of four. A table takes two bytes to 20 bits, and the rows pass
    in small groups, so that little memory is needed.
    """
    if packed.size and int(packed.max()) >= 3**5:
        raise ValueError("a byte of base3 is above 242")
    digits = np.arange(256)[:, None] // 3 ** np.arange(5) % 3 + 1  # (256, 5), 1 to 3: codes offset by 2
    ten_bits = (digits << 2 * np.arange(5)).sum(1).astype(np.uint32)
    table = (ten_bits | ten_bits[:, None] << np.uint32(10)).reshape(-1)  # by first byte + 256 * second byte
    rows, width = packed.shape
    dense = np.empty((rows, -(-width // 4) * 5), np.uint8)
    for start in range(0, rows, ROWS_AT_ONCE):
        some = np.pad(packed[start : start + ROWS_AT_ONCE], ((0, 0), (0, -width % 4)))
        halves = table[some.view("<u2")].reshape(len(some), -1, 2).astype("<u8")
        words = halves[..., 0] | halves[..., 1] << np.uint64(20)
        dense[start : start + len(some)] = (
            words.view(np.uint8).reshape(len(some), -1, 8)[:, :, :5].reshape(len(some), -1)
        )
    return dense


def _refuse_lowest_code(packed: Bytes, bits: int, columns: int) -> None:
    """A grid that is symmetric around zero does not use the lowest code, whose digits are all zero."""
    whole = packed[:, : columns * bits // 8]
    lowest = np.uint8(sum(1 << place for place in range(0, 8, bits)))  # the lowest bit of every code of a byte
    used = whole.copy()
    for shift in range(1, bits):
        used |= whole >> np.uint8(shift)
    if ((used & lowest) != lowest).any():
        raise ValueError("a code lies outside the grid")
