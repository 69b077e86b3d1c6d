"""`bitmill bench paper`: the tables of Tao et al. (ACL 2022) beside ours. Every cell of the paper says whether we saw
it in a public source or recall it; an unmarked figure is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column

from jobs.bench.rows import WITH_CONTRAST, Key, Row, named
from jobs.bench.students import Score, bench_run, train_all
from jobs.display import Display, print_table, print_warnings
from pipeline.config.run import Config
from pipeline.errors import RunError
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.store.records import Teacher, TeacherCache

TableNumber = Literal["1", "3"]
FULL = "full precision"
MIB = "MiB packed"
PAPERS_WEIGHT = 0.1  # of its contrastive loss
ROUNDING = "rounding, per_channel"  # the floor; the paper's tables have none


@dataclass(frozen=True)
class Cell:
    """A figure of the paper, `seen` in a public source or recalled."""

    value: float
    seen: bool = False

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.value:g} ({'s' if self.seen else 'r'})"


NOT_GIVEN = Cell(math.nan)
Cells = dict[Key, tuple[Cell, ...]]  # a table, by method and width


def _cells(seen: str, *values: float) -> tuple[Cell, ...]:
    """Return one cell a value; `seen` has a letter for each, s or r."""
    return tuple(Cell(value, letter == "s") for value, letter in zip(values, seen, strict=True))


# Columns: size in MiB, perplexity on WikiText-2, PTB and WikiText-103, accuracy on Persona-Chat. The paper gives the
# sizes of its own method alone.
TABLE_1: Cells = {
    (FULL, "32"): _cells("rsrrs", 474.9, 14.48, 14.72, 14.19, 77.01),
    ("quantgpt", "8-8-8"): _cells("rsssr", 121.4, 15.31, 14.90, 14.58, 76.12),
    ("quantgpt", "4-4-8"): _cells("rrrrs", 62.4, 15.55, 14.95, 15.31, 76.57),
    ("quantgpt", "2-2-8"): _cells("ssrss", 33.0, 17.30, 16.12, 16.98, 74.78),
    ("pact", "8-8-8"): (NOT_GIVEN, *_cells("srsr", 17.49, 16.11, 16.76, 74.73)),
    ("pact", "4-4-8"): (NOT_GIVEN, *_cells("rrrr", 19.23, 20.17, 20.15, 25.13)),
    ("pact", "2-2-8"): (NOT_GIVEN, *_cells("rrrs", 173.02, 189.13, 171.03, 5.52)),
    ("lsq", "8-8-8"): (NOT_GIVEN, *_cells("rrrr", 16.75, 15.43, 15.24, 75.28)),
    ("lsq", "4-4-8"): (NOT_GIVEN, *_cells("rrrr", 78.99, 79.76, 75.12, 45.10)),
    ("lsq", "2-2-8"): (NOT_GIVEN, *_cells("rrrs", 847.54, 544.98, 1470.86, 5.54)),
    ("laq", "8-8-8"): (NOT_GIVEN, *_cells("ssss", 16.91, 15.87, 15.88, 76.02)),
    ("laq", "4-4-8"): (NOT_GIVEN, *_cells("rrrr", 17.12, 16.55, 16.91, 71.17)),
    ("laq", "2-2-8"): (NOT_GIVEN, *_cells("rrrr", 19.15, 18.25, 18.97, 71.36)),
}

# Columns: size in MiB, ROUGE-1, ROUGE-2, ROUGE-L of BART base on XSum.
TABLE_3: Cells = {
    (FULL, "32"): _cells("srrr", 532.0, 40.75, 18.10, 33.05),
    ("quantgpt", "8-8-8"): _cells("srrr", 138.1, 40.25, 17.78, 32.70),
    ("quantgpt", "4-4-8"): _cells("rrrr", 72.4, 40.24, 17.71, 32.69),
    ("quantgpt", "2-2-8"): _cells("srrr", 39.6, 39.15, 16.72, 31.72),
}


@dataclass(frozen=True)
class Tiny:
    """A configuration of minutes that stands for columns of a table, and its metrics, each with what multiplies it.
    `overrides` make it shorter, because a table trains a dozen students."""

    config: str
    metrics: dict[str, float]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Full:
    """The paper's setting of some columns. `tokens` are those that all epochs of distillation train on."""

    config: str
    parameters: float
    tokens: float
    gpus: int = 1
    operations: int = 6  # forward and backward; two more where the teacher runs in the step

    @property
    def gpu_hours(self) -> float:
        """Return the hours by arithmetic: `operations` a parameter and token, `SUSTAINED` a second."""
        return self.operations * self.parameters * self.tokens / SUSTAINED / 3600


SUSTAINED = 1e13  # floating-point operations a second of a data-centre GPU in fp32, an assumption


@dataclass(frozen=True)
class PaperTable:
    """A table, its columns, and the configurations that stand for it here."""

    cells: Cells
    columns: tuple[str, ...]
    tiny: tuple[Tiny, ...]
    full: tuple[Full, ...]
    needs: str


TABLES: dict[TableNumber, PaperTable] = {
    "1": PaperTable(
        TABLE_1,
        ("MiB without scales", "WikiText-2", "PTB", "WikiText-103", "Persona-Chat, %"),
        (
            Tiny("configs/quickstart.yaml", {"perplexity": 1}, ("distill.steps=60",)),
            Tiny("configs/next-utterance-chitchat.yaml", {"accuracy": 100}, ("distill.steps=60",)),
        ),
        (
            Full("configs/gpt2-wikitext2.yaml", 124e6, 80 * 2.4e6),
            Full("configs/gpt2-ptb.yaml", 124e6, 120 * 1.1e6),
            Full("configs/gpt2-wikitext103.yaml", 124e6, 8 * 118e6, gpus=4),
            Full("configs/gpt2-personachat.yaml", 124e6, 2 * 131e3 * 4 * 256, operations=8),
        ),
        "GPT-2 small (124M parameters), WikiText-2, PTB, WikiText-103 and Persona-Chat from the Hugging Face hub: 80, "
        "120, 8 and 2 epochs of 2.4, 1.1 and 118 million tokens and 131,000 examples of 4 replies",
    ),
    "3": PaperTable(
        TABLE_3,
        ("MiB without scales", "ROUGE-1", "ROUGE-2", "ROUGE-L"),
        (Tiny("configs/summarization-aclsum.yaml", {"rouge1": 1, "rouge2": 1, "rougeL": 1}),),
        (Full("configs/bart-xsum.yaml", 139e6, 8 * 204e3 * (512 + 64), gpus=4),),
        "BART base (139M parameters) and XSum from the Hugging Face hub: 8 epochs of 204,000 articles",
    ),
}
OPTIONS = {"resources.workers": "--workers"}
OWN = frozenset({"distill.lr", "distill.seed"})  # what the configuration of a table decides beside `students.COMMON`


def rows_of(table: PaperTable) -> dict[str, Row]:
    """Return the paper's methods as recipes, one scale a matrix: its own with contrast, started and moved as suits so
    few steps, and the others without."""
    rows = {ROUNDING: named(ROUNDING)}
    for method in dict.fromkeys(method for method, _ in table.cells if method != FULL):
        rows[method] = named(WITH_CONTRAST[PAPERS_WEIGHT] if method == "quantgpt" else f"{method}, per_tensor")
    return rows


def beside(number: TableNumber, bases: Sequence[Config], console: Console) -> dict[str, Any]:
    """Train the table's methods on the configurations, one for each of its `tiny`, and print both; returns the
    document of `--json`. Raises RunError if every student of a configuration failed."""
    table = TABLES[number]
    widths = dict.fromkeys(bits for method, bits in table.cells if method != FULL)
    cells = {**table.cells, **{(ROUNDING, bits): () for bits in widths}}
    scored = [_scored(table, base, [key for key in cells if key[0] != FULL], console) for base in bases]
    ours = [metrics for metrics, _ in scored]
    stems = [Path(tiny.config).stem for tiny in table.tiny]
    _print(number, bases, cells, ours, console)
    return {
        "table": number,
        "configurations": stems,
        "measured": sorted({day for _, days in scored for day in days}),
        "steps": {stem: base.distill.steps for stem, base in zip(stems, bases, strict=True)},
        "rate": {stem: base.distill.lr for stem, base in zip(stems, bases, strict=True)},
        "rows": [
            {
                "method": method,
                "bits": bits,
                "paper": {
                    column: {"value": cell.value, "seen": cell.seen}
                    for column, cell in zip(table.columns, known, strict=False)
                    if cell is not NOT_GIVEN
                },
                "ours": {stem: metrics[method, bits] for stem, metrics in zip(stems, ours, strict=True)},
            }
            for (method, bits), known in cells.items()
        ],
    }


Scored = dict[Key, dict[str, float] | None]  # metrics and MiB by method and width; None: it failed


def _scored(table: PaperTable, base: Config, keys: Sequence[Key], console: Console) -> tuple[Scored, set[str]]:
    """Return what each method gave, and the days and kinds of machine it was measured on."""
    rows = rows_of(table)
    runs = []
    for method, bits in keys:
        tried = rows[method].own_try(bits)._replace(rate=base.distill.lr)
        runs.append(bench_run(base, rows[method], bits, tried, base.distill.seed))
    plan = plan_run(base, TeacherCache.stage)
    print_warnings(console, plan.warnings)
    with Display(console) as display:
        shared = run_plan(plan, display)
        scores = train_all(runs, Score, base.resources, display, "table")
    sound = [score for score in scores if not score.failure]
    if not sound:
        raise RunError(f"Every student of {base.name} failed; the first: {scores[0].failure}")
    teacher = {**sound[0].teacher, MIB: shared.finished(Teacher).record.fp32_bytes / 2**20}
    students = [None if s.failure else {**s.student, MIB: s.packed_bytes / 2**20} for s in scores]
    metrics: Scored = {(FULL, "32"): teacher, **dict(zip(keys, students, strict=True))}
    return metrics, {score.measured for score in sound}


def _print(
    number: TableNumber, bases: Sequence[Config], cells: Cells, ours: Sequence[Scored], console: Console
) -> None:
    table = TABLES[number]
    rates = " and ".join(f"{b.name}, {b.distill.steps or 'all'} steps at lr {b.distill.lr:g}" for b in bases)
    columns = [{MIB: 1.0, **tiny.metrics} for tiny in table.tiny]
    headers = ["method", "bits", *(f"paper {column}" for column in table.columns)]
    headers += [f"ours {name}{', %' if times == 100 else ''}" for group in columns for name, times in group.items()]
    title = f"Table {number}; (s) seen in a public source, (r) recalled; ours, in this order: {rates}, one seed"
    rows = []
    for key, known in cells.items():
        printed = [*map(str, known)] or [""] * len(table.columns)
        for group, metrics in zip(columns, ours, strict=True):
            values = metrics[key]
            printed += ["failed" if values is None else f"{times * values[n]:.2f}" for n, times in group.items()]
        rows.append((*key, *printed))
    folded = (Column(header, overflow="fold") for header in headers)
    print_table(console, folded, rows, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def requirements(number: TableNumber, console: Console) -> dict[str, Any]:
    """Print what the full scale takes, and the commands that run it; returns the document of `--json`."""
    table = TABLES[number]
    # For a configuration with the paper's preset: another method in place of its own.
    other = "--set quant.quantizer={} --set quant.gamma_init=auto --set distill.contrast_weight=0"
    options = {method: "--preset paper" if method == "quantgpt" else other.format(method) for method, _ in table.cells}
    commands = [
        f"bitmill compress {full.config} --bits {bits} {options[method]}"
        for full in table.full
        for method, bits in table.cells
        if method != FULL
    ]
    console.print(f"Table {number} at the paper's scale needs {table.needs}. We have not run it.")
    console.print(
        "GPUs of 24 GB by our estimate; hours of one for a cell by arithmetic (6 operations a parameter and token, "
        f"8 with the teacher in the step; {SUSTAINED / 1e12:g} trillion a second in fp32; the teacher's own training "
        "and the evaluation not counted):"
    )
    for full in table.full:
        console.print(f"  {full.config}: {full.gpu_hours:.1f} GPU hours, set up for {full.gpus}")
    console.print("The commands, one a cell:")
    console.print("\n".join(f"  {command}" for command in commands), soft_wrap=True)
    hours = {full.config: {"gpus": full.gpus, "gpu_hours": round(full.gpu_hours, 1)} for full in table.full}
    return {"table": number, "needs": table.needs, "gpus": hours, "commands": commands}
