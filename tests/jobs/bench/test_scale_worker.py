"""The memory of a worker that tokenizes a large .jsonl.gz: measured here on a small one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from jobs.bench.scale.worker import FILE, MOST_MB, measure, told, write_rows
from tests.conftest import ROOT


def test_a_worker_tokenizes_all_that_is_for_training(tmp_path: Path) -> None:
    document = measure(0.5, tmp_path, run=lambda work, *arguments: work(*arguments))
    assert json.loads((tmp_path / FILE).read_text()) == document
    assert document["rows"] > 200
    assert 0 < document["idle_mb"] <= document["peak_mb"]
    assert document["stored_mib"] < document["mib"]
    assert f"takes {document['peak_mb']:,.0f} MB at most" in told(document)
    first = write_rows(tmp_path / "text.jsonl.gz", 20_000)
    with gzip.open(tmp_path / "text.jsonl.gz", "rt") as file:
        rows = [json.loads(line)["text"] for line in file]
    assert rows == first
    assert 20_000 <= sum(len(row) + 13 for row in rows) < 22_000


def test_two_gib_were_tokenized_in_the_memory_that_is_allowed_and_told() -> None:
    document = json.loads((ROOT / "jobs" / "bench" / "results" / FILE).read_text(encoding="utf-8"))
    assert document["mib"] == 2048
    assert document["idle_mb"] < document["peak_mb"] < MOST_MB
    held = f"held {document['peak_mb']:,.0f} MB at most, {document['idle_mb']:,.0f} of them before it began"
    readme = (ROOT / "pipeline" / "store" / "README.md").read_text(encoding="utf-8")
    assert f"of JSON lines ({document['stored_mib']:,.0f} compressed) {held}" in " ".join(readme.split())
