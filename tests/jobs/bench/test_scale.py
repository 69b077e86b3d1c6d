"""`bitmill bench scale`, tiny; and what its committed results say."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from jobs.bench.chaos.processes import start
from jobs.bench.scale.measure import FILES_S, LIMITS_S, MOST_MEMORY, MOST_TIME, STAGES, TIMES, cells, growth, measure
from tests.conftest import ROOT

RESULTS = ROOT / "jobs" / "bench" / "results" / "scale.json"
README = (ROOT / "pipeline" / "store" / "README.md").read_text(encoding="utf-8")


def test_all_is_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=200)
    document = measure(0.05, 300, 40, tmp_path, console, run=lambda work, *arguments: work(*arguments))
    assert json.loads((tmp_path / "scale.json").read_text()) == document
    assert (tmp_path / "scale.png").stat().st_size > 0
    assert [row["stage"] for row in document["stages"]] == [*STAGES] * len(TIMES)
    assert all(row["cpu_s"] > 0 and min(row["peak_mib"], row["idle_mib"]) > 0 for row in document["stages"])
    rows = [row["rows"] for row in document["stages"] if row["stage"] == "tokenize"]
    assert 9 < rows[-1] / rows[0] < 11
    large = document["large"]
    assert large["objects"] >= 300
    assert large["versions"] == large["found"] == 40
    assert large["left"] == 0
    assert large["trials"] == 1000
    assert document["files"]["files"] == 300
    assert large["garbage"] >= large["deleted"] > 20
    assert all(large[name]["cpu_s"] > 0 for name in LIMITS_S)
    assert "40 versions" in console.file.getvalue()
    assert "text of 0.5 MiB: tokenize and cache" in console.file.getvalue()
    said = capsys.readouterr().err
    assert all(f"{name} of " in said for name in LIMITS_S)


def test_an_interruption_ends_the_process_that_works(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    modules = "from jobs.bench.scale.measure import alone; from tests.jobs.bench.test_scale import wait"
    code = f"{modules}; alone(wait, {str(started)!r})"
    with start([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=ROOT) as command:
        while not (started.exists() and started.read_text()):
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in command.stderr.read()
    assert not psutil.pid_exists(int(started.read_text()))


def wait(place: str) -> None:
    """Work for ever, after a word of which process does."""
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)


def test_growth_is_that_of_the_largest_over_the_smallest() -> None:
    measured = ((1, 2, 50), (10, 22, 55))
    rows = [{"stage": s, "mib": m, "cpu_s": t, "idle_mib": 25, "peak_mib": p} for s in STAGES for m, t, p in measured]
    assert growth(rows) == {stage: {"time": 1.1, "memory": 1.2} for stage in STAGES}
    none = [row | {"peak_mib": row["idle_mib"]} for row in rows]
    assert growth(none) == {stage: {"time": 1.1, "memory": 1.0} for stage in STAGES}


def test_what_was_measured_is_within_the_limits_and_is_what_the_readme_says() -> None:
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    stages, large = document["stages"], document["large"]
    assert document["growth"] == growth(stages)
    assert max(row["mib"] for row in stages) >= 10 * min(row["mib"] for row in stages)
    for grown in document["growth"].values():
        assert grown["memory"] <= MOST_MEMORY
        assert grown["time"] <= MOST_TIME
    assert large["objects"] >= 100_000
    assert large["versions"] >= 20_000
    assert large["trials"] >= 1000
    files = document["files"]
    assert files["files"] >= 100_000
    assert files["first_s"] <= FILES_S
    assert (
        f"of 100,000 files are learned in {files['first_s']:.0f} s of the CPU, and told again in {files['again_s']:.0f}"
        in README
    )
    lines = [cells(row) for row in stages]
    lines += [(name, f"{large[name]['cpu_s']:.2f}", f"{limit:g}") for name, limit in LIMITS_S.items()]
    for line in lines:
        assert f"| {' | '.join(line)} |" in README
    grown = [f"{document['growth'][stage]['time']:.2f}" for stage in STAGES]
    assert f"takes {grown[0]} times the seconds of one of the smallest in `tokenize` and {grown[1]}" in README
    assert f"`gc` finds {large['garbage']:,} steps" in README
    assert f"the sweep has {large['trials']:,} trials" in README
    assert f"`delete` is of {large['deleted']} steps" in README
    memory = [f"{document['growth'][stage]['memory']:.2f}" for stage in STAGES]
    assert f"memory is\n{memory[0]} and {memory[1]} times as much" in README
    assert all(large[name]["cpu_s"] <= limit for name, limit in LIMITS_S.items())
