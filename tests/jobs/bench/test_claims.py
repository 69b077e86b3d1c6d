"""Claims about the presets are read off a table: met, not met, a tie, or open."""

from __future__ import annotations

import pytest

from jobs.bench.claims import claims
from jobs.bench.rows import REFERENCE, WITH_CONTRAST, WITHOUT_CONTRAST
from jobs.bench.summary import lines
from tests.jobs.bench.test_summary import documents, score, scores

LIGHT, PAPERS = WITH_CONTRAST.values()
GAPS = {
    REFERENCE: [0.30, 0.31, 0.33],
    WITHOUT_CONTRAST: [0.33, 0.35, 0.34],
    PAPERS: [0.31, 0.32, 0.32],
    "seq, per_channel": [0.20, 0.22, 0.23],
    "twn, per_channel": [0.28, 0.30, 0.31],
    "smallest": [0.20, 0.19, 0.21],
    "best": [0.12, 0.13, 0.14],
}
SIZES = {"best": 120, "smallest": 80}
COSINES = {LIGHT: 0.2, PAPERS: 0.2, WITHOUT_CONTRAST: 0.3}
ONE_SEED = {name: gaps[:1] for name, gaps in GAPS.items()}


def made(changed, spreads=None):
    """Return the claims on a table; `spreads` has how far the documents of a row are from its mean."""
    gaps = GAPS | changed
    table = [
        one.model_copy(update={"token_cosine": COSINES.get(name, 0.25) + 0.01 * one.seed * one.gap_nats})
        for name, values in gaps.items()
        for one in scores(name, values, size=SIZES.get(name, 100))
    ]
    texts = {(name, "2-2-8"): documents(sum(gaps[name]) / 3, spread) for name, spread in (spreads or {}).items()}
    return {claim.text: claim for claim in claims(lines(table, "2-2-8", texts), "quickstart")}


def of(claims, word):
    return [claim.verdict for text, claim in claims.items() if word in text]


def test_all_claims_of_a_table_that_bears_them_out():
    every = made({})
    assert len(every) == 5
    assert all(claim.verdict == "met" and str(claim).startswith("met: ") for claim in every.values()), every


@pytest.mark.parametrize(
    ("changed", "word", "verdict"),
    [
        ({"best": [0.36, 0.38, 0.40]}, "of best is smaller", "NOT met"),
        ({"best": [0.10, 0.35, 0.20]}, "of best is smaller", "tie"),  # smaller, and the interval holds zero
        ({"best": [0.24, 0.24, 0.25]}, "best has the smallest", "NOT met"),
        ({"best": [0.02, 0.40, 0.10]}, "best has the smallest", "tie"),
        ({"smallest": [0.36, 0.37, 0.38]}, "of smallest is smaller", "NOT met"),
        ({"smallest": [0.26, 0.275, 0.28]}, "smallest has the smallest", "met"),  # seq is not ternary
        ({"smallest": [0.40, 0.41, 0.42]}, "smallest has the smallest", "NOT met"),
        ({WITHOUT_CONTRAST: [0.21, 0.22, 0.21]}, "contrast at weight 0.1", "NOT met"),  # at a cost
        ({LIGHT: [0.33, 0.35, 0.34]}, "contrast at weight 0.03", "tie"),  # seeds equal: no interval
        ({LIGHT: [0.31, 0.335, 0.32]}, "contrast at weight 0.03", "met"),
        ({LIGHT: [0.33, 0.36, 0.34]}, "contrast at weight 0.03", "tie"),
        ({LIGHT: [0.33, 0.34, 0.3399]}, "contrast at weight 0.03", "tie"),  # a gain, or none
        ({LIGHT: [0.36, 0.38, 0.375]}, "contrast at weight 0.03", "NOT met"),
    ],
)
def test_a_claim_that_fails_is_said(changed, word, verdict):
    every = made(changed)
    assert of(every, word) == [verdict]
    assert all(str(claim).startswith(f"{claim.verdict}: ") for claim in every.values())


@pytest.mark.parametrize(("spread", "gains", "costs"), [(0.01, "met", "NOT met"), (2.0, "tie", "tie")])
def test_what_seeds_agree_on_is_a_tie_where_other_documents_may_say_the_contrary(spread, gains, costs):
    every = made({}, {REFERENCE: 0.01, "best": spread})
    assert of(every, "of best is smaller") == [gains]
    assert of(made({}, {"seq, per_channel": 0.01, "best": spread}), "best has the smallest") == [gains]
    assert of(every, "of smallest is smaller") == ["met"]
    dearer = made({LIGHT: [0.36, 0.38, 0.37]}, {WITHOUT_CONTRAST: 0.01, LIGHT: spread})
    assert of(dearer, "contrast at weight 0.03") == [costs]


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("best has the smallest", "0.1200 nats; next of 6, seq, per_channel, 0.2000 (less that of best: +0.0800)"),
        ("smallest has the sm", "0.2000 nats; next of 4, twn, per_channel, 0.2800 (less that of smallest: +0.0800)"),
        ("contrast at weight 0.1", "the cosine changes by -0.1002, the gap by -0.0200 nats"),
        ("of best is smaller", "0.40 of it in 1.20 of the bytes; less it -0.1800 nats"),
        ("of smallest is smaller", "0.67 of it in 0.80 of the bytes; less it -0.1000 nats"),
    ],
)
def test_what_needs_an_interval_is_left_open_with_one_seed(word, number):
    (claim,) = [claim for text, claim in made(ONE_SEED).items() if word in text]
    assert (claim.verdict, claim.number) == ("open", number)
    assert str(claim).startswith("open: ")


def test_one_seed_is_enough_to_say_that_a_claim_fails():
    assert of(made(ONE_SEED | {"best": [0.25]}), "best has the smallest") == ["NOT met"]


def test_a_preset_that_failed_is_a_claim_that_is_not_met():
    table = lines([score(REFERENCE, 0.3), score("twn, per_channel", 0.2)], "2-2-8", {})
    said = claims(table, "my-model", {("best", "2-2-8"): "no", ("lsq, per_channel", "2-2-8"): "no"})
    assert [str(claim) for claim in said] == ["NOT met: 2-2-8: best trains: it failed"]


def test_of_a_reference_better_than_its_teacher_no_share_is_met_by_a_worse_preset():
    assert of(made({REFERENCE: [-0.015, -0.014, -0.016]}), "of best is smaller") == ["NOT met"]


def test_wide_widths_are_held_to_the_teachers_perplexity():
    table = [
        *(one for bits in ("4-4-8", "8-8-8") for one in scores("best", [0.003, 0.004, 0.005], bits=bits)),
        score("lsq, per_channel", 0.5),
    ]
    wide = [line for bits in ("4-4-8", "8-8-8", "2-2-8") for line in lines(table, bits, {})]
    number = "+0.40% [+0.15%, +0.65%]"
    assert [(c.verdict, c.number) for c in claims(wide, "quickstart")] == [("met", number), ("NOT met", number)]
    assert claims(wide, "my-model") == []
    assert [(c.verdict, c.number) for c in claims(wide, "bench-stories260K")] == [("met", number)] * 2


@pytest.mark.parametrize(
    ("gaps", "spread", "verdict", "number"),
    [
        ([0.009], None, "open", "+0.90%"),
        ([0.009, 0.009], None, "met", "+0.90%"),
        ([0.011], None, "NOT met", "+1.11%"),
        ([0.002, 0.008, 0.014], None, "open", "+0.80% [-0.69%, +2.32%]"),
        ([0.003, 0.004, 0.005], 0.001, "met", "+0.40% [+0.15%, +0.65%] {+0.38%, +0.42%}"),
        ([0.003, 0.004, 0.005], 0.1, "open", "+0.40% [+0.15%, +0.65%] {-1.18%, +2.00%}"),
    ],
)
def test_a_mean_within_the_limit_settles_nothing_if_seeds_or_documents_may_lie_beyond(gaps, spread, verdict, number):
    texts = {} if spread is None else {("best", "4-4-8"): documents(sum(gaps) / len(gaps), spread)}
    (claim,) = claims(lines(scores("best", gaps, bits="4-4-8"), "4-4-8", texts), "quickstart")
    assert str(claim) == f"{verdict}: 4-4-8: the perplexity of best within 1.0% of the teacher's: {number}"
