"""Packed bytes in the kernels' layout stand for the package's own levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.package.codec import Packed
from pipeline.quant.grid import dequantize
from pipeline.quant.packing import pack
from pipeline.quant.spec import grid
from pipeline.runtime.weights import Matrix, _matrix, _refuse_lowest_code


def levels_of(matrix: Matrix) -> np.ndarray:
    """Every weight, decoded code by code."""
    rows = len(matrix.data)
    codes = np.unpackbits(matrix.data, axis=-1, bitorder="little").reshape(rows, -1, matrix.block, matrix.bits)
    whole = (codes * (1 << np.arange(matrix.bits))).sum(-1) - (1 << matrix.bits - 1)
    weights = (whole + matrix.shift) * matrix.scales[..., None]
    return weights.reshape(rows, -1)[:, : matrix.columns]


@pytest.mark.parametrize("columns", [3, 5, 32, 48, 64, 96, 128, 130, 256, 640])
@pytest.mark.parametrize(
    ("bits", "levels", "encoding"),
    [(2, "symmetric", "dense"), (2, "symmetric", "base3"), (2, "full", "dense"), (2, "midpoint", "dense")]
    + [(bits, levels, "dense") for bits in (4, 8) for levels in ("symmetric", "full", "midpoint")],
)
def test_weights_are_those_of_the_codes(columns, bits, levels, encoding):
    torch.manual_seed(columns)
    chosen = grid(levels, bits)
    codes = torch.randint(chosen.low, chosen.high + 1, (7, columns), dtype=torch.int8)
    scales = torch.rand(7, 1)
    packed = pack(codes, bits, encoding, levels)
    matrix = _matrix(Packed(packed, scales, bits, columns, encoding), levels)
    assert np.array_equal(levels_of(matrix).astype(np.float32), dequantize(codes, scales, chosen).numpy())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize(
    ("bits", "levels", "encoding"),
    [(2, "symmetric", "base3"), (2, "midpoint", "dense"), (4, "full", "dense"), (8, "symmetric", "dense")],
)
def test_a_block_has_the_scale_of_its_group(size, groups, bits, levels, encoding):
    torch.manual_seed(size)
    chosen, columns = grid(levels, bits), groups * size
    codes = torch.randint(chosen.low, chosen.high + 1, (7, columns), dtype=torch.int8)
    scales = torch.rand(7, groups)
    matrix = _matrix(Packed(pack(codes, bits, encoding, levels), scales, bits, columns, encoding), levels)
    assert matrix.grouped
    assert size % matrix.block == 0
    expected = (codes.float() + chosen.shift).reshape(7, groups, size) * scales[..., None]
    assert np.array_equal(levels_of(matrix).astype(np.float32), expected.reshape(7, columns).numpy())


@pytest.mark.parametrize(("columns", "groups"), [(62, 2), (96, 2), (160, 2), (64, 4), (96, 0)])
def test_groups_of_a_size_that_no_student_has_are_refused(columns, groups):
    """A block of 32 could lie in two groups of 31."""
    packed = pack(torch.zeros(7, columns, dtype=torch.int8), 2)
    with pytest.raises(ValueError, match="is not one a matrix, a row or a group"):
        _matrix(Packed(packed, torch.ones(7, groups), 2, columns, "dense"), "symmetric")


@pytest.mark.parametrize("columns", [8, 11])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_lowest_code_is_outside_a_symmetric_grid(bits, columns):
    full = grid("full", bits)
    codes = torch.zeros(3, columns, dtype=torch.int8)
    _refuse_lowest_code(pack(codes, bits, levels="full").numpy(), bits, columns)
    codes[1, 5] = full.low
    with pytest.raises(ValueError, match="outside the grid"):
        _refuse_lowest_code(pack(codes, bits, levels="full").numpy(), bits, columns)


@pytest.mark.parametrize("columns", [6, 160])
def test_bytes_that_no_codes_give_are_refused(columns):
    packed = pack(torch.zeros(2, columns, dtype=torch.int8), 2, "base3")
    packed[1, 0] = 243
    with pytest.raises(ValueError, match="above 242"):
        _matrix(Packed(packed, torch.ones(2, 1), 2, columns, "base3"), "symmetric")


@pytest.mark.parametrize("encoding", ["dense", "base3"])
def test_what_stands_behind_the_end_of_a_row_is_checked(encoding):
    packed = pack(torch.zeros(2, 6, dtype=torch.int8), 2, encoding)
    _matrix(Packed(packed, torch.ones(2, 1), 2, 6, encoding), "symmetric")
    packed[1, -1] = 242
    with pytest.raises(ValueError, match=r"outside the .* grid|that no codes give"):
        _matrix(Packed(packed, torch.ones(2, 1), 2, 6, encoding), "symmetric")
