"""`bitmill bench paper`: the tables of Tao et al. (ACL 2022) beside ours.

Every cell of the paper says whether we saw it in a public source or recall it; an unmarked figure is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from jobs.bench.rows import Row
from jobs.bench.trials import run_trials, trial
from jobs.display import Display
from pipeline import flow
from pipeline.config import Config
from pipeline.presets import PRESETS
from pipeline.records import TeacherCache

TableNumber = Literal["1", "3"]
Scale = Literal["tiny", "full"]
WIDTHS = ("8-8-8", "4-4-8", "2-2-8")
FULL = "full precision"


@dataclass(frozen=True)
class Cell:
    """A figure of the paper, `seen` in a public source or recalled."""

    value: float
    seen: bool = False

    def __str__(self) -> str:
        return f"{self.value:g} ({'s' if self.seen else 'r'})"


def _cells(seen: str, *values: float) -> tuple[Cell, ...]:
    """One cell a value; `seen` has a letter for each, s or r."""
    return tuple(Cell(value, letter == "s") for value, letter in zip(values, seen, strict=True))


# Columns: perplexity on WikiText-2, PTB and WikiText-103, accuracy on Persona-Chat.
TABLE_1: dict[tuple[str, str], tuple[Cell, ...]] = {
    (FULL, "32"): _cells("srrs", 14.48, 14.72, 14.19, 77.01),
    ("quantgpt", "8-8-8"): _cells("sssr", 15.31, 14.90, 14.58, 76.12),
    ("quantgpt", "4-4-8"): _cells("rrrs", 15.55, 14.95, 15.31, 76.57),
    ("quantgpt", "2-2-8"): _cells("srss", 17.30, 16.12, 16.98, 74.78),
    ("pact", "8-8-8"): _cells("srsr", 17.49, 16.11, 16.76, 74.73),
    ("pact", "4-4-8"): _cells("rrrr", 19.23, 20.17, 20.15, 25.13),
    ("pact", "2-2-8"): _cells("rrrs", 173.02, 189.13, 171.03, 5.52),
    ("lsq", "8-8-8"): _cells("rrrr", 16.75, 15.43, 15.24, 75.28),
    ("lsq", "4-4-8"): _cells("rrrr", 78.99, 79.76, 75.12, 45.10),
    ("lsq", "2-2-8"): _cells("rrrs", 847.54, 544.98, 1470.86, 5.54),
    ("laq", "8-8-8"): _cells("ssss", 16.91, 15.87, 15.88, 76.02),
    ("laq", "4-4-8"): _cells("rrrr", 17.12, 16.55, 16.91, 71.17),
    ("laq", "2-2-8"): _cells("rrrr", 19.15, 18.25, 18.97, 71.36),
}

# Columns: ROUGE-1, ROUGE-2, ROUGE-L of BART base on XSum.
TABLE_3: dict[tuple[str, str], tuple[Cell, ...]] = {
    (FULL, "32"): _cells("rrr", 40.75, 18.10, 33.05),
    ("quantgpt", "8-8-8"): _cells("rrr", 40.25, 17.78, 32.70),
    ("quantgpt", "4-4-8"): _cells("rrr", 40.24, 17.71, 32.69),
    ("quantgpt", "2-2-8"): _cells("rrr", 39.15, 16.72, 31.72),
}


@dataclass(frozen=True)
class PaperTable:
    """A table, its columns, and the configurations that stand for it here."""

    cells: dict[tuple[str, str], tuple[Cell, ...]]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]  # ours, for the tiny configuration
    tiny: str
    full: tuple[str, ...]
    needs: str


TABLES: dict[TableNumber, PaperTable] = {
    "1": PaperTable(
        TABLE_1,
        ("WikiText-2", "PTB", "WikiText-103", "Persona-Chat, %"),
        ("perplexity",),
        "configs/quickstart.yaml",
        (
            "configs/gpt2-wikitext2.yaml",
            "configs/gpt2-ptb.yaml",
            "configs/gpt2-wikitext103.yaml",
            "configs/gpt2-personachat.yaml",
        ),
        "GPT-2 small (124M parameters), WikiText-2, PTB, WikiText-103 and Persona-Chat from the Hugging Face hub, and "
        "GPUs: 80, 120 and 8 epochs of 2.4, 1.1 and 118 million tokens. We have not run it",
    ),
    "3": PaperTable(
        TABLE_3,
        ("ROUGE-1", "ROUGE-2", "ROUGE-L"),
        ("rouge1", "rouge2", "rougeL"),
        "configs/summarization-aclsum.yaml",
        ("configs/bart-xsum.yaml",),
        "BART base (139M parameters) and XSum from the Hugging Face hub, and GPUs: 8 epochs of 204,000 articles. "
        "We have not run it",
    ),
}


def rows_of(table: PaperTable) -> dict[str, Row]:
    """The paper's methods as recipes: its own preset, and the others per matrix without contrast."""
    methods = dict.fromkeys(method for method, _ in table.cells if method != FULL)
    others = {"granularity": "tensor"}
    return {
        method: Row(method, PRESETS["paper"])
        if method == "quantgpt"
        else Row(method, {"quant": {"quantizer": method, **others}, "distill": {"contrast_weight": 0.0}})
        for method in methods
    }


def beside(number: TableNumber, base: Config, console: Console) -> dict[str, Any]:
    """Train the table's methods on the configuration and print both; returns the document of `--json`."""
    table = TABLES[number]
    rows = rows_of(table)
    keys = [key for key in table.cells if key[0] != FULL]
    trials = [trial(base, rows[method], bits, base.distill.lr, base.distill.seed) for method, bits in keys]
    with Display(console) as display:
        flow.run(flow.plan(base, TeacherCache.stage), display)
        display.started("table")
        scores = run_trials(
            trials, base.resources, lambda done, total, note, points=(): display.advanced("table", done, total, note)
        )
    ours = {key: score.student for key, score in zip(keys, scores, strict=True)}
    ours[FULL, "32"] = scores[0].teacher
    shown = Table(
        "method",
        "bits",
        *(f"paper: {c}" for c in table.columns),
        *(f"ours: {m}" for m in table.metrics),
        title=f"Table {number}; (s) seen in a public source, (r) recalled; ours: {base.name}",
    )
    for key, cells in table.cells.items():
        shown.add_row(*key, *map(str, cells), *(f"{ours[key][metric]:.2f}" for metric in table.metrics))
    console.print(shown)
    return {
        "table": number,
        "configuration": base.name,
        "rows": [
            {
                "method": method,
                "bits": bits,
                "paper": {c: {"value": x.value, "seen": x.seen} for c, x in zip(table.columns, cells, strict=True)},
                "ours": ours[method, bits],
            }
            for (method, bits), cells in table.cells.items()
        ],
    }


def requirements(number: TableNumber, console: Console) -> dict[str, Any]:
    """What the full scale takes, and the commands that run it."""
    table = TABLES[number]
    commands = [
        f"bitmill compress {config} --set preset=paper --bits {bits}" for config in table.full for bits in WIDTHS
    ]
    console.print(f"Table {number} at the paper's scale needs {table.needs}. The commands, one a cell:")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return {"table": number, "needs": table.needs, "commands": commands}
