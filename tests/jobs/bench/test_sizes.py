"""`bitmill bench sizes`: each encoding's bytes, and the sizes that the paper prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.bench.sizes import BITS, ENCODINGS, MIB, MODELS, measure, packed_size


def test_each_option_makes_the_file_smaller_and_the_paper_counts_the_same():
    console = Console(file=io.StringIO(), width=200)
    rows = measure(console)["sizes"]
    of_base3 = sum(form == "base3" for form, _ in ENCODINGS.values())
    assert len(rows) == len(MODELS) * (len(BITS) * len(ENCODINGS) - of_base3 * (len(BITS) - 1))
    for model in MODELS:
        for bits in BITS:
            size = {row["encoding"]: row for row in rows if (row["model"], row["bits"]) == (model, bits)}
            assert size.pop("dense, a scale a matrix")["packed_bytes"] < size["dense"]["packed_bytes"]
            grouped = [size.pop(f"dense, groups of {n}")["packed_bytes"] for n in (32, 64, 128)]
            largest = size["dense"]["packed_bytes"]
            assert grouped[0] > grouped[1] > grouped[2] > largest
            assert grouped[1] > size.pop("dense, groups of 64, scales fp16")["packed_bytes"] > largest
            assert all(row["packed_bytes"] < largest for name, row in size.items() if name != "dense")
            assert size["dense, all short"] == min(
                (row for name, row in size.items() if name.startswith("dense")), key=lambda row: row["packed_bytes"]
            )
            assert len({row["paper_bytes"] for row in size.values()}) == 1
            if bits == "2-2-8":
                assert size["base3, all short"]["packed_bytes"] == min(row["packed_bytes"] for row in size.values())
    assert "base3, all short" in console.file.getvalue()


@pytest.mark.parametrize(
    ("model", "bits", "mib", "ratio"),
    [
        ("GPT-2 small", "2-2-8", 32.9, 14.4),
        ("GPT-2 small", "4-4-8", 62.4, 7.6),
        ("GPT-2 small", "8-8-8", 121.3, 3.9),
        ("BART base", "2-2-8", 39.6, 13.4),
        ("BART base", "4-4-8", 72.4, 7.3),
        ("BART base", "8-8-8", 138.1, 3.9),
    ],
)
def test_by_the_papers_counting_sizes_are_the_papers(model, bits, mib, ratio):
    size = packed_size(MODELS[model], bits, "dense, a scale a matrix")
    assert round(size.paper_bytes / MIB, 1) == mib
    assert round(size.paper_ratio, 1) == ratio
