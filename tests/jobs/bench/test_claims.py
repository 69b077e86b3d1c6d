"""Claims about the presets are read off a table: met, not met, or not to be checked."""

from __future__ import annotations

import re

import pytest

from jobs.bench.claims import claims
from jobs.bench.summary import lines
from tests.jobs.bench.test_summary import score, scores

GAPS = {
    "paper": [0.30, 0.31, 0.32],
    "paper without contrast": [0.33, 0.35, 0.34],
    "seq, per_channel": [0.20, 0.21, 0.23],
    "twn, per_channel": [0.28, 0.29, 0.31],
    "smallest": [0.20, 0.19, 0.21],
    "best": [0.12, 0.13, 0.14],
}
COSINES = {"paper": 0.2, "paper without contrast": 0.3}


def found(**changed):
    gaps = GAPS | changed
    table = [
        one.model_copy(update={"token_cosine": COSINES.get(name, 0.25) + 0.01 * one.seed * one.gap_nats})
        for name, values in gaps.items()
        for one in scores(name, values)
    ]
    return {claim.text: claim for claim in claims(lines(table, "2-2-8"), "quickstart")}


def of(claims, word):
    return [claim.met for text, claim in claims.items() if word in text]


def test_all_claims_of_a_table_that_bears_them_out():
    made = found()
    assert len(made) == 5
    assert all(claim.met and str(claim).startswith("met: ") for claim in made.values()), made
    number = next(c.number for t, c in made.items() if "best is at most" in t)
    assert re.fullmatch(rf"{0.13 / 0.31:.3f}; less 0.5 of it -0.0250 \[-0.0[34]\d\d, -0.01\d\d\] nats", number)


@pytest.mark.parametrize(
    ("changed", "word", "met"),
    [
        ({"best": [0.17, 0.18, 0.19]}, "of best is at most", [False]),
        ({"best": [0.10, 0.15, 0.20]}, "of best is at most", [None]),  # on average, and the interval holds zero
        ({"best": [0.21, 0.20, 0.22]}, "best has the smallest", [False]),
        ({"best": [0.02, 0.40, 0.10]}, "best has the smallest", [False]),  # smaller, and the interval holds zero
        ({"smallest": [0.26, 0.27, 0.28]}, "of smallest is at most", [False]),
        ({"smallest": [0.26, 0.275, 0.28]}, "smallest has the smallest", [True]),  # seq is not ternary
        ({"smallest": [0.40, 0.41, 0.42]}, "smallest has the smallest", [False]),
        ({"paper without contrast": [0.21, 0.22, 0.21]}, "contrast at weight 0.1", [False]),  # at a cost
        ({"paper, contrast 0.03": [0.33, 0.35, 0.34]}, "contrast at weight 0.03", [None]),  # seeds equal: no interval
        ({"paper, contrast 0.03": [0.33, 0.345, 0.34]}, "contrast at weight 0.03", [True]),
        ({"paper, contrast 0.03": [0.33, 0.36, 0.34]}, "contrast at weight 0.03", [None]),  # a cost, or none
        ({"paper, contrast 0.03": [0.36, 0.38, 0.37]}, "contrast at weight 0.03", [False]),
    ],
)
def test_a_claim_that_fails_is_said(changed, word, met):
    made = found(**changed)
    assert of(made, word) == met
    verdicts = {True: "met: ", False: "NOT met: ", None: "open: "}
    assert all(str(claim).startswith(verdicts[claim.met]) for claim in made.values())


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("best has the smallest", "0.1200 nats; next of 5, seq, per_channel, 0.2000"),
        ("smallest has the smallest", "0.2000 nats; next of 3, twn, per_channel, 0.2800"),
        ("contrast at weight 0.1", "the cosine changes by -0.1000, the gap by -0.0300 nats"),
        ("of best is at most", "0.400; less 0.5 of it -0.0300 nats"),
    ],
)
def test_what_needs_an_interval_is_left_open_with_one_seed(word, number):
    made = found(**{name: gaps[:1] for name, gaps in GAPS.items()})
    (claim,) = [claim for text, claim in made.items() if word in text]
    assert (claim.met, claim.number) == (None, number)
    assert str(claim).startswith("open: ")


def test_one_seed_is_enough_to_say_that_a_claim_fails():
    made = found(**{name: gaps[:1] for name, gaps in GAPS.items()} | {"best": [0.25]})
    assert of(made, "best has the smallest") == [False]


def test_a_preset_that_failed_is_a_claim_that_is_not_met():
    table = lines([score("paper", 0.3), score("twn, per_channel", 0.2)], "2-2-8")
    found = claims(table, "my-model", {("best", "2-2-8"): "no", ("lsq, per_channel", "2-2-8"): "no"})
    assert [str(claim) for claim in found] == ["NOT met: 2-2-8: best trains: it failed"]


def test_of_a_student_better_than_its_teacher_no_share_is_met_by_a_worse_one():
    made = found(paper=[-0.015, -0.014, -0.016])
    assert of(made, "of best is at most") == [False]


def test_wide_widths_are_held_to_the_teachers_perplexity():
    table = [
        *(one for bits in ("4-4-8", "8-8-8") for one in scores("best", [0.003, 0.004, 0.005], bits=bits)),
        score("lsq, per_channel", 0.5),
    ]
    wide = [line for bits in ("4-4-8", "8-8-8", "2-2-8") for line in lines(table, bits)]
    number = "+0.40% [+0.15%, +0.65%]"
    assert [(c.met, c.number) for c in claims(wide, "quickstart")] == [(True, number), (False, number)]
    assert claims(wide, "my-model") == []
    assert [(c.met, c.number) for c in claims(wide, "bench-stories260K")] == [(True, number), (True, number)]


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.009], "open: 4-4-8: the perplexity of best within 1.0% of the teacher's: +0.90%"),
        ([0.009, 0.009], "met: 4-4-8: the perplexity of best within 1.0% of the teacher's: +0.90%"),
        ([0.011], "NOT met: 4-4-8: the perplexity of best within 1.0% of the teacher's: +1.11%"),
        (
            [0.002, 0.008, 0.014],
            "open: 4-4-8: the perplexity of best within 1.0% of the teacher's: +0.80% [-0.69%, +2.32%]",
        ),
    ],
)
def test_a_mean_within_the_limit_settles_nothing_if_seeds_may_lie_beyond(gaps, said):
    assert list(map(str, claims(lines(scores("best", gaps, bits="4-4-8"), "4-4-8"), "quickstart"))) == [said]
