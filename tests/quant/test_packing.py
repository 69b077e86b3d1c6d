import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.packing import pack, packed_columns, unpack
from pipeline.quant.spec import levels

FORMATS = [(2, "dense"), (4, "dense"), (8, "dense"), (2, "base3")]
each_format = pytest.mark.parametrize(("bits", "encoding"), FORMATS)


def random_codes(rows, columns, bits, seed=0):
    n = levels(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-n, n + 1, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 43), st.integers(0, 2**32))
def test_unpack_of_pack_is_exact(fmt, rows, columns, seed):
    bits, encoding = fmt
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits, encoding)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits, encoding))
    back = unpack(packed, columns, bits, encoding)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@each_format
def test_every_code_survives_at_every_place(bits, encoding):
    n = levels(bits)
    for columns in range(1, 12):
        codes = torch.arange(-n, n + 1).to(torch.int8).unsqueeze(1).expand(-1, columns)
        assert torch.equal(unpack(pack(codes, bits, encoding), columns, bits, encoding), codes)


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
def test_a_row_can_be_read_alone(bits, encoding):
    codes = random_codes(6, 13, bits)
    packed = pack(codes, bits, encoding)
    assert torch.equal(unpack(packed[4:5], 13, bits, encoding), codes[4:5])


@each_format
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_outside_the_grid_are_refused(bits, encoding, sign):
    codes = torch.zeros(2, 3, dtype=torch.int16)
    codes[1, 2] = sign * (levels(bits) + 1)
    with pytest.raises(ValueError, match=f"{bits}-bit grid -{levels(bits)}..{levels(bits)}"):
        pack(codes, bits, encoding)


@each_format
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_packed_shape_that_does_not_fit_is_refused(bits, encoding, extra):
    columns = 20
    packed = pack(random_codes(2, columns, bits), bits, encoding)
    wrong = torch.cat([packed, packed[:, :1]], 1) if extra == 1 else packed[:, :-1]
    with pytest.raises(
        ValueError, match=rf"packed bytes of shape \({wrong.shape[0]}, {wrong.shape[1]}\) do not hold rows of 20 codes"
    ):
        unpack(wrong, columns, bits, encoding)


@each_format
def test_tensors_that_are_not_matrices_are_refused(bits, encoding):
    codes = random_codes(4, 20, bits)
    packed = pack(codes, bits, encoding)
    for wrong in (codes[0], codes.reshape(2, 2, 20)):
        with pytest.raises(ValueError, match=r".+"):
            pack(wrong, bits, encoding)
    for wrong in (packed[0], packed.unsqueeze(-1), packed.reshape(2, 2, -1)):
        with pytest.raises(ValueError, match=r".+"):
            unpack(wrong, 20, bits, encoding)


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
