"""`bitmill bench sizes`: each encoding's bytes, on models small enough for a test."""

from __future__ import annotations

import io

from rich.console import Console

from jobs.bench.sizes import BITS, ENCODINGS, measure
from tests.conftest import ARCHITECTURES


def test_each_option_makes_the_file_smaller_and_the_paper_counts_the_same():
    console = Console(file=io.StringIO(), width=200)
    sources = {name: ARCHITECTURES[name] | {"vocab_size": 300} for name in ("gpt2", "bart")}
    rows = measure(console, sources)["sizes"]
    assert len(rows) == len(sources) * (len(BITS) * len(ENCODINGS) - 2 * (len(BITS) - 1))
    for model in sources:
        for bits in BITS:
            size = {row["encoding"]: row for row in rows if (row["model"], row["bits"]) == (model, bits)}
            largest = size["dense"]["packed_bytes"]
            assert all(row["packed_bytes"] < largest for name, row in size.items() if name != "dense")
            assert size["dense, all short"] == min(
                (row for name, row in size.items() if name.startswith("dense")), key=lambda row: row["packed_bytes"]
            )
            assert len({row["paper_bytes"] for row in size.values()}) == 1
            if bits == "2-2-8":
                assert size["base3, all short"]["packed_bytes"] == min(row["packed_bytes"] for row in size.values())
    assert "base3, all short" in console.file.getvalue()
