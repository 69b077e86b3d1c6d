"""What our blocks hold, read by the GGUF project's own Python package."""

import gguf
import numpy as np
import pytest

from pipeline.export.ggml_blocks import NoBlockError, pack_blocks
from pipeline.quant.granularity import GROUP_SIZES
from pipeline.quant.spec import grid

CASES = [
    ("symmetric", 2, 512, "TQ2_0"),
    ("symmetric", 2, 96, "Q4_0"),
    ("full", 2, 256, "TQ2_0"),
    ("full", 2, 32, "Q4_0"),
    ("midpoint", 2, 768, "Q2_K"),
    ("midpoint", 2, 64, "Q4_0"),
    ("symmetric", 4, 256, "Q4_0"),
    ("full", 4, 96, "Q4_0"),
    ("midpoint", 4, 512, "Q4_K"),
    ("midpoint", 4, 96, "Q8_0"),
    ("symmetric", 8, 256, "Q8_0"),
    ("full", 8, 32, "Q8_0"),
]


GROUPED = [
    ("symmetric", 2, 512, "Q4_0"),
    ("full", 2, 256, "Q4_0"),
    ("midpoint", 2, 768, "Q4_0"),
    ("symmetric", 4, 256, "Q4_0"),
    ("full", 4, 384, "Q4_0"),
    ("midpoint", 4, 512, "Q8_0"),
    ("symmetric", 8, 256, "Q8_0"),
    ("full", 8, 256, "Q8_0"),
]


@pytest.mark.parametrize(
    ("levels", "bits", "columns", "expected", "size"),
    [(*case, 0) for case in CASES] + [(*case, size) for case in GROUPED for size in GROUP_SIZES],
)
def test_every_level_comes_back_with_the_scale_in_fp16(levels, bits, columns, expected, size):
    random, kind, groups = np.random.default_rng(bits), grid(levels, bits), columns // size if size else 1
    codes = random.integers(kind.low, kind.high + 1, (7, columns)).astype(np.int8)
    codes[0, :2] = kind.low, kind.high
    scale = random.uniform(1e-3, 0.3, (7, groups)).astype(np.float32)
    scale[-1] = 0.0
    name, packed = pack_blocks(codes, scale, kind, bits)
    assert name == expected
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    scale = scale.repeat(columns // groups, axis=1)
    numbers = (2 if kind.shift else 1) * codes.astype(np.float64) + (1 if kind.shift else 0)
    stored = (scale / 2 if kind.shift else scale).astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(found, (numbers * stored).astype(np.float32))
    np.testing.assert_allclose(found, (codes + kind.shift) * scale, rtol=2.0**-11)


@pytest.mark.parametrize(
    ("levels", "bits", "columns", "scale", "message"),
    [
        ("midpoint", 8, 256, 0.1, "levels -128 to 127 of 8 bits"),  # odd numbers to 255
        ("symmetric", 2, 48, 0.1, "in rows of 48"),
        ("symmetric", 8, 32, 1e-6, "Q8_0 has scales of fp16, which does not hold 1e-06"),  # it would be rounded away
        ("symmetric", 8, 32, 1e6, "which does not hold 1e[+]06"),
    ],
)
def test_what_no_block_holds_is_said(levels, bits, columns, scale, message):
    codes, groups = np.zeros((2, columns), np.int8), max(1, columns // 32)
    for scales in (np.full((2, 1), scale, np.float32), np.full((2, groups), scale, np.float32)):
        with pytest.raises(NoBlockError, match=message):
            pack_blocks(codes, scales, grid(levels, bits), bits)
