"""From scores to a table: intervals against numpy, the front against brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.bench.documents import Documents, bootstrapped
from jobs.bench.pictures import cosine_figure, front_figure
from jobs.bench.rows import REFERENCE, WITH_CONTRAST, WITHOUT_CONTRAST, Try
from jobs.bench.students import Score, best_tries
from jobs.bench.summary import COMPARED, HEADER, Interval, Line, cells, lines, markdown, paired, pareto_lines

PNG = b"\x89PNG\r\n\x1a\n"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}  # of any table of Student's t


def score(row=REFERENCE, gap=0.1, seed=1, bits="2-2-8", rate=1e-3, weight=0.0, nats=1.0, size=100, cosine=0.2):
    student = {"perplexity": 10 * math.exp(gap), "kl_nats": gap / 2, "top1_agreement": 0.75}
    return Score(
        row=row,
        bits=bits,
        rate=rate,
        contrast_weight=weight,
        seed=seed,
        digest="0",
        validation_nats=nats,
        teacher={"perplexity": 10.0},
        student=student,
        packed_bytes=size,
        token_cosine=cosine,
        measured="2026-01-02, x86_64",
    )


def scores(row, gaps, seeds=None, **given):
    seeds = range(1, 1 + len(gaps)) if seeds is None else seeds
    return [score(row, gap, seed, **given) for gap, seed in zip(gaps, seeds, strict=True)]


def test_the_gap_is_the_logarithm_of_the_ratio_of_perplexities():
    found = score().model_copy(update={"teacher": {"perplexity": 8.0}, "student": {"perplexity": 10.0}})
    assert found.gap_nats == pytest.approx(math.log(1.25))
    assert score(gap=-0.1).gap_nats == pytest.approx(-0.1)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 10])
def test_an_interval_is_students_of_the_paired_differences(seeds):
    random = np.random.default_rng(seeds)
    left, right = random.normal(0.3, 0.1, seeds), random.normal(0.2, 0.1, seeds)
    found = paired(scores("a", left), scores("b", right))
    differences = left - right
    half = T_975[seeds - 1] * differences.std(ddof=1) / math.sqrt(seeds)
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=half * 5e-4)
    assert found.high == pytest.approx(differences.mean() + half, abs=half * 5e-4)


def test_the_gap_of_a_row_has_an_interval_over_its_seeds():
    (line,) = lines(scores("best", [0.1, 0.2, 0.3]), "2-2-8", {})
    half = T_975[2] * 0.1 / math.sqrt(3)
    assert line.gap_nats == line.gap_interval.mean == pytest.approx(0.2)
    assert (line.gap_interval.low, line.gap_interval.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-3)
    (one,) = lines(scores("best", [0.1]), "2-2-8", {})
    assert one.gap_interval == Interval(one.gap_nats)


def test_seeds_are_paired_by_number_and_not_by_place():
    left = scores("a", [1.0, 2.0, 3.0], [0, 1, 2])
    right = scores("b", [3.5, 0.9, 1.7, 99.0], [2, 0, 1, 7])
    shuffled = paired(left, right)
    ordered = paired(left, scores("b", [0.9, 1.7, 3.5], [0, 1, 2]))
    assert shuffled.mean == pytest.approx((0.1 + 0.3 - 0.5) / 3)
    assert (shuffled.low, shuffled.high) == pytest.approx((ordered.low, ordered.high))


def test_seeds_that_only_one_row_has_do_not_count():
    assert paired(scores("a", [1.0, 5.0], [0, 1]), scores("b", [0.5, 9.0], [0, 2])).mean == pytest.approx(0.5)
    assert paired(scores("a", [1.0], [0]), scores("b", [1.0], [1])) is None
    assert paired([], scores("b", [1.0])) is None


def test_one_seed_has_a_difference_and_no_interval():
    found = paired(scores("a", [0.3]), scores("b", [0.1]))
    assert (found.low, found.high, found.excludes_zero) == (None, None, False)
    assert found.mean == pytest.approx(0.2)


def test_differences_without_spread_have_no_interval():
    found = paired(scores("a", [0.5, 0.5]), scores("b", [0.5, 0.5]))
    assert found == Interval(0.0)


@pytest.mark.parametrize(
    ("interval", "excludes"),
    [
        (Interval(1, 0.5, 1.5), True),
        (Interval(-1, -1.5, -0.5), True),
        (Interval(0.1, -0.4, 0.6), False),
        (Interval(1, 0.5, 1.5, (0.1, 1.9)), True),
        (Interval(-1, -1.5, -0.5, (-1.9, -0.1)), True),
        (Interval(1, 0.5, 1.5, (-0.1, 2.1)), False),  # other documents may say the contrary
        (Interval(1, -0.5, 2.5, (0.1, 1.9)), False),  # other seeds may
        (Interval(1, None, None, (0.1, 1.9)), False),  # of one seed
    ],
)
def test_an_interval_excludes_zero_over_seeds_and_over_documents_or_not(interval, excludes):
    assert interval.excludes_zero == excludes


def test_an_interval_shows_both_of_its_ends():
    assert str(Interval(0.5)) == "+0.5000"
    assert str(Interval(0.5, 0.25, 0.75)) == "+0.5000 [+0.2500, +0.7500]"
    assert str(Interval(0.5, 0.25, 0.75, (-0.1, 1.1))) == "+0.5000 [+0.2500, +0.7500] {-0.1000, +1.1000}"
    assert str(Interval(0.5, None, None, (-0.1, 1.1))) == "+0.5000 {-0.1000, +1.1000}"


def table(*extra):
    return [
        *scores(REFERENCE, [0.30, 0.32, 0.31], rate=2e-3, weight=0.03),
        *scores("best", [0.10, 0.11, 0.15], size=120, rate=0.03),
        *scores("smallest", [0.20, 0.25, 0.22], size=80),
        *extra,
    ]


def test_a_table_goes_from_the_largest_gap_to_the_smallest():
    found = lines([*table(), *scores("other", [9.0], bits="4-4-8")], "2-2-8", {})
    assert [line.row for line in found] == [REFERENCE, "smallest", "best"]
    reference, smallest, best = found
    assert (reference.seeds, reference.rate, reference.contrast_weight) == (3, 2e-3, 0.03)
    assert reference.gap_nats == pytest.approx(0.31)
    assert reference.kl_nats == pytest.approx(0.155)
    assert (best.packed_bytes, smallest.packed_bytes) == (120, 80)
    assert [list(line.differences) for line in found] == [
        ["best", "smallest"],
        [REFERENCE, "best"],
        [REFERENCE, "smallest"],
    ]
    assert best.less(REFERENCE).mean == pytest.approx(0.12 - 0.31)
    assert best.less(REFERENCE, "kl_nats").mean == pytest.approx((0.12 - 0.31) / 2)
    assert best.less(REFERENCE, "top1_agreement") == best.less(REFERENCE, "token_cosine") == Interval(0.0)
    ours, theirs = reference.less("best"), best.less(REFERENCE)
    assert ours.mean == pytest.approx(-theirs.mean)
    assert (ours.low, ours.high) == pytest.approx((-theirs.high, -theirs.low))
    assert best.less("smallest") == paired(scores("best", [0.10, 0.11, 0.15]), scores("smallest", [0.20, 0.25, 0.22]))
    assert [line.row for line in lines(table(), "8-8-8", {})] == []


def test_an_untrained_row_is_compared_with_every_seed():
    rounding = "rounding, per_channel"
    found = {line.row: line for line in lines(table(score(rounding, 0.9)), "2-2-8", {})}[rounding]
    differences = 0.9 - np.array([0.30, 0.32, 0.31])
    half = T_975[2] * differences.std(ddof=1) / math.sqrt(3)
    assert found.seeds == 1
    assert found.gap_nats == pytest.approx(0.9)
    less = found.less(REFERENCE)
    assert less.mean == pytest.approx(differences.mean())
    assert (less.low, less.high) == pytest.approx((differences.mean() - half, differences.mean() + half), rel=1e-3)


def test_a_trained_row_of_one_seed_has_no_interval():
    found = {line.row: line for line in lines(table(score("lsq, per_channel", 0.9)), "2-2-8", {})}["lsq, per_channel"]
    assert found.less(REFERENCE) == Interval(pytest.approx(0.6))


def test_a_table_without_references_has_no_differences():
    (found,) = lines(scores("lsq, per_channel", [0.1, 0.2]), "2-2-8", {})
    assert found.differences == {}


def documents(gap, spread=0.01):
    """Documents of ten tokens, each with a gap of its own around the mean."""
    gaps = gap + spread * np.linspace(-1, 1, 50)
    return Documents(tokens=[10] * 50, teacher=[20.0] * 50, student=(20 + 10 * gaps).tolist())


def test_gaps_alone_have_an_interval_over_documents():
    texts = {(REFERENCE, "2-2-8"): documents(0.31), ("best", "2-2-8"): documents(0.12, 0.1)}
    texts["smallest", "4-4-8"] = documents(0.2)  # of another width
    shown = {line.row: line for line in lines(table(), "2-2-8", texts)}
    best, smallest = shown["best"], shown["smallest"]
    assert best.gap_interval.documents == bootstrapped(texts["best", "2-2-8"])
    assert best.less(REFERENCE) == replace(
        paired(scores("best", [0.10, 0.11, 0.15]), scores(REFERENCE, [0.30, 0.32, 0.31])),
        documents=bootstrapped(texts["best", "2-2-8"], texts[REFERENCE, "2-2-8"]),
    )
    assert {best.less(REFERENCE, metric).documents for metric in COMPARED if metric != "gap_nats"} == {None}
    assert smallest.gap_interval.documents is smallest.less("best").documents is best.less("smallest").documents is None


def test_cells_say_what_the_line_says():
    tried = {REFERENCE: (4e-3, 2e-3, 8e-3), "best": (0.03,), "smallest": (5e-4, 1e-3, 2e-3)}
    search = [{"row": row, "bits": "2-2-8", "rate": rate} for row, rates in tried.items() for rate in rates]
    search.append({"row": "best", "bits": "4-4-8", "rate": 0.01})
    shown = {line.row: dict(zip(HEADER, cells(line), strict=True)) for line in lines(table(), "2-2-8", {}, search)}
    assert shown[REFERENCE]["gap, nats"] == "0.3100"
    assert shown[REFERENCE]["less reference's"] == ""
    rates = ["0.002 (the lowest of 3), contrast 0.03", "0.03 (of 1)", "0.001 (of 3)"]
    assert [shown[row]["rate"] for row in tried] == rates
    assert (shown[REFERENCE]["seeds"], shown["best"]["less smallest's"][:7]) == ("3", "**-0.10")
    assert shown["best"]["less reference's"].startswith("**-0.1900 [-0.")  # bold: the interval is without zero
    assert shown["best"]["bytes"] == "120"
    assert shown["best"]["same top token"] == "0.7500"
    (single,) = lines([score("x")], "2-2-8", {})
    everything = dict.fromkeys(COMPARED, Interval(0.25, 0.2, 0.3, (-0.1, 0.6)))  # not bold
    cell = dict(zip(HEADER, cells(replace(single, differences={REFERENCE: everything})), strict=True))
    assert (cell["less reference's"], cell["rate"]) == ("+0.2500 [+0.2000, +0.3000] {-0.1000, +0.6000}", "0.001")


def test_markdown_is_a_table():
    text = markdown(lines(table(), "2-2-8", {})).splitlines()
    assert len(text) == 5
    assert len({line.count("|") for line in text}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in text)


def line(row, size, gap, bits="2-2-8"):
    return Line(row, bits, 1e-3, 0.0, (), 1, gap, 0.1, 0.9, 0.3, size, Interval(gap), {})


points = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4])), max_size=12)


@settings(max_examples=150, deadline=None)
@given(points)
def test_the_front_is_what_no_other_row_beats(found):
    table = [line(f"row {number}", size, gap) for number, (size, gap) in enumerate(found)]
    best = pareto_lines(table)
    expected = set()
    for number, (size, gap) in enumerate(found):
        better = [(s, g) for s, g in found if (s < size and g <= gap) or (s <= size and g < gap)]
        if not better:
            expected.add(f"row {number}")  # equals stay together
    assert {x.row for x in best} == expected
    sizes = [x.packed_bytes for x in best]
    assert sizes == sorted(sizes)
    assert all(a.gap_nats >= b.gap_nats for a, b in pairwise(best))


@pytest.mark.parametrize(
    "table",
    [
        [line(REFERENCE, 100, 0.3), line(WITHOUT_CONTRAST, 100, 0.35), line("best", 120, 0.1, "4-4-8")],
        [line("paper", 100, 0.3)],
        [line("paper", 100, -0.01), line("best", 120, 0.0)],  # students as good as the teacher
        [line(f"row {n}", 100 + n, 0.5 / (n + 1), f"2-{(2, 4, 8, 32)[n % 4]}-{(8, 32)[n // 4]}") for n in range(8)],
    ],
    ids=["several", "one", "no gap", "eight widths"],
)
def test_pictures_are_files(table, tmp_path):
    (axes,) = front_figure(table, "title").axes
    drawn = sum(len(points.get_offsets()) for points in axes.collections)
    assert drawn == len(table)  # every row at every width, however many
    best = pareto_lines(table)
    assert axes.lines[0].get_xydata().tolist() == [[line.packed_bytes, line.gap_nats] for line in best]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        (line.row, (line.packed_bytes, line.gap_nats)) for line in best
    ]
    front_figure(table, "title").savefig(tmp_path / "front.png")
    cosine_figure(table, "title").savefig(tmp_path / "cosine.png")
    for name in ("front.png", "cosine.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_rate_and_weight_are_chosen_by_validation_for_each_row_and_width():
    tried = [
        score("a", gap=0.1, rate=1e-3, nats=2.0),  # the better on test does not count
        score("a", gap=0.9, rate=2e-3, nats=1.5, weight=0.1),
        score("a", gap=0.2, rate=2e-3, nats=1.7),
        score("a", rate=5e-4, nats=3.0, bits="4-4-8"),
        score("a", rate=1e-3, nats=math.inf, bits="4-4-8"),
        score("b", rate=4e-3, nats=1.0),
        score("c").model_copy(update={"failure": "diverged"}),
    ]
    expected = {("a", "2-2-8"): Try(2e-3, 0.1), ("a", "4-4-8"): Try(5e-4, 0.0), ("b", "2-2-8"): Try(4e-3, 0.0)}
    assert best_tries(tried) == best_tries(tried[::-1]) == expected
    assert best_tries([]) == {}


def test_what_contrast_does_is_drawn_beside_going_without():
    light, papers = WITH_CONTRAST.values()
    drawn = [
        one.model_copy(update={"token_cosine": cosine * (0.9 + 0.1 * one.seed)})
        for row, gaps, cosine in (
            (WITHOUT_CONTRAST, [0.30, 0.32], 0.3),
            (papers, [0.33, 0.36], 0.1),
            (light, [0.31, 0.33], 0.2),
            (REFERENCE, [0.1, 0.1], 0.5),
        )
        for one in scores(row, gaps)
    ]
    table = [*lines(drawn, "2-2-8", {}), *lines([score(papers, 0.05, bits="4-4-8", cosine=0.25)], "4-4-8", {})]
    left, right = cosine_figure(table, "title").axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["2-2-8", "4-4-8"]
    heights = [[[round(bar.get_height(), 6) for bar in bars] for bars in axes.containers] for axes in (left, right)]
    assert [bars.get_label() for bars in left.containers] == [WITHOUT_CONTRAST, light, papers]
    assert heights == [[[0.315], [0.21], [0.105, 0.25]], [[0.31], [0.32], [0.345, 0.05]]]
    changes = [[text.get_text().split("\n")[0] for text in axes.texts] for axes in (left, right)]
    assert changes == [["", "-0.1050", "-0.2100", ""], ["", "+0.0100", "+0.0350", ""]]
