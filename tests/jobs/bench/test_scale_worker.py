"""The memory of a worker that tokenizes a large .jsonl.gz: measured here on a small one, and what is committed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from jobs.bench.scale.worker import FILE, MOST_MB, measure, told, write_rows
from tests.conftest import ROOT

RESULTS = ROOT / "jobs" / "bench" / "results" / FILE
README = (ROOT / "pipeline" / "store" / "README.md").read_text(encoding="utf-8")


def test_a_worker_tokenizes_all_that_is_for_training(tmp_path: Path) -> None:
    document = measure(0.5, tmp_path, run=lambda work, *arguments: work(*arguments))
    assert json.loads((tmp_path / FILE).read_text()) == document
    assert document["rows"] > 200
    assert 0 < document["idle_mb"] <= document["peak_mb"]
    assert document["stored_mib"] < document["mib"]
    first = write_rows(tmp_path / "text.jsonl.gz", 20_000)
    with gzip.open(tmp_path / "text.jsonl.gz", "rt") as file:
        rows = [json.loads(line)["text"] for line in file]
    assert rows == first
    assert 20_000 <= sum(len(row) + 13 for row in rows) < 22_000


def test_what_was_measured_is_below_the_limit_and_is_what_the_readme_says() -> None:
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert document["mib"] * 2**20 >= 2e9
    assert document["peak_mb"] < MOST_MB
    assert told(document) in " ".join(README.split())
