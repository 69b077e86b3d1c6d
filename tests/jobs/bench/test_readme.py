"""The README's tables are what the committed results say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.bench.rows import named
from tests.conftest import ROOT

RESULTS = ROOT / "jobs" / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRESETS = ("paper", "best", "smallest")


def results(name: str) -> Any:
    return json.loads((RESULTS / name / "quantizers.json").read_text(encoding="utf-8"))


def recipe(row: str) -> str:
    if row in PRESETS:
        return f"**`{row}`**"
    if row.startswith("rounding"):
        return f"rounding{' to `seq`' if 'seq' in row else ''} by row, not trained"
    if row.startswith("paper"):
        return f"`paper`{row.removeprefix('paper')}"
    return "`{}` by {}".format(*row.split(", "))


def rate(line: dict[str, Any]) -> str:
    if not named(line["row"]).trained:
        return ""
    end = {line["tried"][0]: " v", line["tried"][-1]: " ^"}.get(line["rate"], "")
    return f"{line['rate']:g}{end}"


def less(line: dict[str, Any], reference: str, metric: str, digits: int, times: int = 1) -> str:
    found = line["differences"].get(reference, {}).get(metric)
    if found is None:
        return ""
    mean, low, high = (f"{times * found[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def at_two_bits(name: str, digits: int) -> list[str]:
    return [
        f"| {recipe(line['row'])} | {rate(line)} | {line['packed_bytes']:,} | {line['gap_nats']:.{digits}f} "
        f"| {less(line, 'paper', 'gap_nats', digits)} | {line['kl_nats']:.{digits}f} "
        f"| {less(line, 'paper', 'kl_nats', digits)} | {line['top1_agreement']:.1%} "
        f"| {less(line, 'paper', 'top1_agreement', 1, 100)} |".replace("% |", " |")
        for line in results(name)["tables"]["2-2-8"]
    ]


def above_two_bits() -> list[str]:
    teachers = ("quickstart", 4), ("stories260K", 3)
    tables = {
        (name, bits): {line["row"]: line for line in results(name)["tables"][bits]}
        for name, _ in teachers
        for bits in ("4-4-8", "8-8-8")
    }

    def cell(name: str, bits: str, row: str, digits: int) -> str:
        line = tables[name, bits][row]
        return f"{line['gap_nats']:.{digits}f}" + (f" ({rate(line)})" if rate(line) else "")

    return [
        " | ".join(
            [
                f"| {recipe(row)}",
                *(
                    part
                    for name, digits in teachers
                    for part in (
                        cell(name, "4-4-8", row, digits),
                        less(tables[name, "4-4-8"][row], "best", "gap_nats", digits),
                        cell(name, "8-8-8", row, 4),
                    )
                ),
            ]
        )
        + " |"
        for row in tables["quickstart", "4-4-8"]
    ]


@pytest.mark.parametrize(
    ("begins", "expected"),
    [
        ("The GPT-2 at 2-2-8", at_two_bits("quickstart", 4)),
        ("The Llama at 2-2-8", at_two_bits("stories260K", 3)),
        ("Above 2 bits, gaps", above_two_bits()),
    ],
    ids=["gpt2", "llama", "above"],
)
def test_tables(begins: str, expected: list[str]) -> None:
    _, _, after = README.partition(f"\n{begins}")
    table = after.partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(expected) > 10
    assert table == expected
