import dataclasses

import pytest

from pipeline.quant.spec import BitWidths, QuantSpec, grid, levels, levels_of


@pytest.mark.parametrize(("bits", "number_of_levels"), [(2, 3), (4, 15), (8, 255)])
def test_the_grid_is_symmetric_with_an_odd_number_of_levels(bits, number_of_levels):
    assert 2 * levels(bits) + 1 == number_of_levels


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kinds_of_grid_differ_in_what_lies_at_and_around_zero(bits):
    symmetric, full, midpoint = (grid(kind, bits) for kind in ("symmetric", "full", "midpoint"))
    half = 2 ** (bits - 1)
    values = [[code + g.shift for code in range(g.low, g.high + 1)] for g in (symmetric, full, midpoint)]
    assert values[0] == list(range(1 - half, half))
    assert values[1] == list(range(-half, half))
    assert values[2] == [code + 0.5 for code in range(-half, half)]
    assert [g.ternary for g in (symmetric, full, midpoint)] == [bits == 2, False, False]


def test_a_grid_that_is_not_known_is_refused_naming_the_valid_ones():
    with pytest.raises(ValueError, match="levels 'quinary' are not known; valid: symmetric, full, midpoint"):
        grid("quinary", 2)


def test_levels_follow_the_quantizer():
    assert (levels_of("lsq"), levels_of("seq")) == ("full", "midpoint")
    others = ("quantgpt", "pact", "lsq_symmetric", "laq", "laq_uniform", "twn", "statistics")
    assert {levels_of(name) for name in others} == {"symmetric"}


@pytest.mark.parametrize("text", ["2-2-8", "4-4-8", "8-8-8", "2-4-8", "8-2-32", "32-32-32", "2-32-8"])
def test_widths_survive_the_round_trip_through_text(text):
    assert str(BitWidths.parse(text)) == text


def test_widths_are_read_in_the_order_weights_embedding_activations():
    assert BitWidths.parse("2-4-8") == BitWidths(weights=2, embedding=4, activations=8)


@pytest.mark.parametrize("text", ["", "2-2", "2-2-8-8", "2x2x8", "2-2-8 ", "2-2-8\n", "-2-2-8", "2.0-2-8", "a-b-c"])
def test_text_of_another_form_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="W-E-A, such as 2-2-8") as caught:
        BitWidths.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part", "width", "valid"),
    [
        ("3-2-8", "weights", 3, "2, 4, 8, 32"),
        ("2-1-8", "embedding", 1, "2, 4, 8, 32"),
        ("2-2-4", "activations", 4, "8, 32"),
        ("2-2-16", "activations", 16, "8, 32"),
        ("0-2-8", "weights", 0, "2, 4, 8, 32"),
    ],
)
def test_a_width_not_offered_is_refused_naming_the_part_and_the_valid_ones(text, part, width, valid):
    with pytest.raises(ValueError, match=f"{width} bits are not offered for {part}; valid: {valid}$"):
        BitWidths.parse(text)


def test_the_start_follows_quantizer_and_width_unless_told():
    widths = BitWidths.parse("2-2-8")
    assert [QuantSpec(widths).starts_at_least_error(bits) for bits in (2, 4, 8)] == [False, True, True]
    for quantizer in ("pact", "lsq", "lsq_symmetric", "seq"):
        assert not any(QuantSpec(widths, quantizer).starts_at_least_error(bits) for bits in (2, 4, 8))
    for quantizer in ("quantgpt", "pact", "lsq", "seq"):
        for told in ("one", "mse"):
            spec = QuantSpec(widths, quantizer, gamma_init=told)
            assert [spec.starts_at_least_error(bits) for bits in (2, 4, 8)] == [told == "mse"] * 3


def test_weight_bits_come_from_the_role():
    spec = QuantSpec(BitWidths.parse("2-4-8"))
    assert spec.weight_bits("h.0.mlp.c_fc", "linear") == 2
    assert spec.weight_bits("wte", "embedding") == 4


def test_the_first_override_that_matches_the_whole_name_wins_for_both_roles():
    spec = QuantSpec(BitWidths.parse("2-2-8"), overrides=((r"h\.0\..*", 8), (r".*c_proj", 4), (r"wte", 32)))
    assert spec.weight_bits("h.0.mlp.c_proj", "linear") == 8
    assert spec.weight_bits("h.1.mlp.c_proj", "linear") == 4
    assert spec.weight_bits("h.1.mlp.c_proj_extra", "linear") == 2
    assert spec.weight_bits("model.h.0.mlp", "linear") == 2
    assert spec.weight_bits("wte", "embedding") == 32


@pytest.mark.parametrize("value", [BitWidths(2, 2, 8), QuantSpec(BitWidths(2, 2, 8))])
def test_values_are_frozen_and_hashable(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(value, name, None)
    assert hash(value) == hash(dataclasses.replace(value))
