import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.packing import pack, packed_columns, unpack

TERNARY_OR_WIDER = [(2, "dense", "symmetric"), (4, "dense", "symmetric"), (8, "dense", "symmetric")]
ALL_PATTERNS = [(bits, "dense", levels) for levels in ("full", "midpoint") for bits in (2, 4, 8)]
FORMATS = [*TERNARY_OR_WIDER, (2, "base3", "symmetric"), *ALL_PATTERNS]
each_format = pytest.mark.parametrize(("bits", "encoding", "levels"), FORMATS)


def ends(bits, levels):
    """The lowest and the highest code."""
    half = 2 ** (bits - 1)
    return (1 - half if levels == "symmetric" else -half), half - 1


def random_codes(rows, columns, bits, levels, seed=0):
    low, high = ends(bits, levels)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 43), st.integers(0, 2**32))
def test_unpack_of_pack_is_exact(fmt, rows, columns, seed):
    bits, encoding, levels = fmt
    codes = random_codes(rows, columns, bits, levels, seed)
    packed = pack(codes, bits, encoding, levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits, encoding))
    back = unpack(packed, columns, bits, encoding, levels)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@each_format
def test_every_code_survives_at_every_place(bits, encoding, levels):
    low, high = ends(bits, levels)
    for columns in range(1, 12):
        codes = torch.arange(low, high + 1).to(torch.int8).unsqueeze(1).expand(-1, columns)
        assert torch.equal(unpack(pack(codes, bits, encoding, levels), columns, bits, encoding, levels), codes)


@pytest.mark.parametrize(
    ("columns", "bits", "encoding", "size"),
    [
        (768, 2, "dense", 192),
        (768, 4, "dense", 384),
        (768, 8, "dense", 768),
        (768, 2, "base3", 154),
        (1, 2, "dense", 1),
        (5, 2, "base3", 1),
        (6, 2, "base3", 2),
        (7, 4, "dense", 4),
        (0, 4, "dense", 0),
    ],
)
def test_packed_sizes(columns, bits, encoding, size):
    assert packed_columns(columns, bits, encoding) == size
    assert pack(torch.zeros(3, columns, dtype=torch.int8), bits, encoding).shape == (3, size)


def test_the_byte_layout_by_hand():
    # The first code sits in the lowest bits, offset by 2^(b-1); in base 3 in the lowest digit, offset by 1.
    codes = torch.tensor([[1, 0, -1, 1, -1]], dtype=torch.int8)
    assert pack(codes, 2).tolist() == [[3 + (2 << 2) + (1 << 4) + (3 << 6), 1]]
    assert pack(codes, 2, "base3").tolist() == [[2 + 1 * 3 + 0 * 9 + 2 * 27 + 0 * 81]]
    assert pack(torch.tensor([[7, -7, 0]], dtype=torch.int8), 4).tolist() == [[15 + (1 << 4), 8]]
    assert pack(torch.tensor([[127, -127, 0]], dtype=torch.int8), 8).tolist() == [[255, 1, 128]]


@each_format
def test_a_row_can_be_read_alone(bits, encoding, levels):
    codes = random_codes(6, 13, bits, levels)
    packed = pack(codes, bits, encoding, levels)
    assert torch.equal(unpack(packed[4:5], 13, bits, encoding, levels), codes[4:5])


@each_format
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_outside_the_grid_are_refused(bits, encoding, levels, sign):
    codes = torch.zeros(2, 3, dtype=torch.int16)
    low, high = ends(bits, levels)
    codes[1, 2] = high + 1 if sign == 1 else low - 1
    with pytest.raises(ValueError, match=f"{bits}-bit grid {low}..{high}"):
        pack(codes, bits, encoding, levels)


@each_format
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_packed_shape_that_does_not_fit_is_refused(bits, encoding, levels, extra):
    columns = 20
    packed = pack(random_codes(2, columns, bits, levels), bits, encoding, levels)
    wrong = torch.cat([packed, packed[:, :1]], 1) if extra == 1 else packed[:, :-1]
    with pytest.raises(
        ValueError, match=rf"packed bytes of shape \({wrong.shape[0]}, {wrong.shape[1]}\) do not hold rows of 20 codes"
    ):
        unpack(wrong, columns, bits, encoding, levels)


@each_format
def test_tensors_that_are_not_matrices_are_refused(bits, encoding, levels):
    codes = random_codes(4, 20, bits, levels)
    packed = pack(codes, bits, encoding, levels)
    for wrong in (codes[0], codes.reshape(2, 2, 20)):
        with pytest.raises(ValueError, match=r".+"):
            pack(wrong, bits, encoding, levels)
    for wrong in (packed[0], packed.unsqueeze(-1), packed.reshape(2, 2, -1)):
        with pytest.raises(ValueError, match=r".+"):
            unpack(wrong, 20, bits, encoding, levels)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_two_bit_patterns_that_are_not_ternary_are_refused(place):
    packed = pack(torch.ones(2, 8, dtype=torch.int8), 2)
    packed[1, 1] &= 255 - (3 << 2 * place)  # the pattern 00 would be the code -2
    with pytest.raises(ValueError, match="outside the 2-bit grid"):
        unpack(packed, 8, 2)


@pytest.mark.parametrize(("bits", "byte"), [(4, 0x80), (4, 0x08), (8, 0x00)])
def test_the_lowest_pattern_of_wider_codes_is_refused(bits, byte):
    with pytest.raises(ValueError, match=f"outside the {bits}-bit grid"):
        unpack(torch.tensor([[byte]], dtype=torch.uint8), 8 // bits, bits)


@pytest.mark.parametrize(("bits", "encoding", "levels"), ALL_PATTERNS)
def test_every_byte_stands_for_codes_of_a_grid_with_all_patterns(bits, encoding, levels):
    good = torch.arange(256, dtype=torch.int16).to(torch.uint8).unsqueeze(1)
    codes = unpack(good, 8 // bits, bits, encoding, levels)
    assert set(codes.unique().tolist()) == set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert torch.equal(pack(codes, bits, encoding, levels), good)


@pytest.mark.parametrize("levels", ["full", "midpoint"])
def test_padding_of_the_other_grids_must_be_zero_too(levels):
    packed = pack(random_codes(2, 7, 2, levels), 2, "dense", levels)
    packed[1, -1] += 64
    with pytest.raises(ValueError, match="values that no codes give"):
        unpack(packed, 7, 2, "dense", levels)


def test_both_ends_must_agree_on_the_grid():
    packed = pack(torch.tensor([[-2, 1]], dtype=torch.int8), 2, "dense", "full")
    with pytest.raises(ValueError, match=r"codes -2\.\.1 lie outside the 2-bit grid -1\.\.1"):
        unpack(packed, 2, 2)
    with pytest.raises(ValueError, match="levels 'quinary' are not known"):
        unpack(packed, 2, 2, "dense", "quinary")
    with pytest.raises(ValueError, match="levels 'quinary' are not known"):
        pack(torch.zeros(1, 2, dtype=torch.int8), 2, "dense", "quinary")


@pytest.mark.parametrize("levels", ["full", "midpoint"])
def test_base3_is_not_for_four_levels(levels):
    with pytest.raises(ValueError, match=f"base3 holds ternary codes, not {levels} ones; valid: dense"):
        pack(torch.zeros(1, 5, dtype=torch.int8), 2, "base3", levels)
    with pytest.raises(ValueError, match=f"base3 holds ternary codes, not {levels} ones; valid: dense"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), 5, 2, "base3", levels)


@pytest.mark.parametrize(
    ("bits", "encoding", "columns", "last_place"), [(2, "dense", 7, 64), (4, "dense", 5, 16), (2, "base3", 9, 81)]
)
def test_padding_that_is_not_zero_is_refused(bits, encoding, columns, last_place):
    packed = pack(torch.zeros(2, columns, dtype=torch.int8), bits, encoding)
    packed[1, -1] += last_place
    with pytest.raises(ValueError, match="values that no codes give"):
        unpack(packed, columns, bits, encoding)


def test_base3_reads_exactly_the_243_bytes_that_codes_give():
    good = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    assert torch.equal(pack(unpack(good, 5, 2, "base3"), 2, "base3"), good)
    for byte in range(243, 256):
        with pytest.raises(ValueError, match="values that no codes give"):
            unpack(torch.tensor([[byte]], dtype=torch.uint8), 5, 2, "base3")


@pytest.mark.parametrize("bits", [4, 8])
def test_base3_is_for_ternary_codes_only(bits):
    with pytest.raises(ValueError, match=f"not {bits} bits; valid: dense"):
        pack(torch.zeros(1, 5, dtype=torch.int8), bits, "base3")


@pytest.mark.parametrize("bits", [1, 3, 16, 32])
def test_other_widths_cannot_be_packed(bits):
    with pytest.raises(ValueError, match=f"{bits} bits cannot be packed; valid: 2, 4, 8"):
        packed_columns(8, bits)
    with pytest.raises(ValueError, match="valid: 2, 4, 8"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 8, bits)
