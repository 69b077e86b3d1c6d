"""`bitmill bench train`: one optimizer step of every kind on whatever device is there, beside transformers' own.

Each row's rounds alternate with rounds of the baseline, which is compiled transformers on a GPU and plain on a CPU: so
what else the machine does falls on both, and only the two are in memory at once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jobs.bench.training import steps as kinds
from jobs.bench.training.held import OwnStore
from jobs.bench.training.measures import Memory, Spread, counted, described, peak_flops, seconds_a_step, top_table, wait
from jobs.bench.training.newton_schulz import orthogonalising
from jobs.bench.training.peers import fake_quantization
from jobs.bench.training.stages import evaluating, packing, tokenizing
from jobs.bench.training.steps import ROWS, Case, Shape, Steps
from jobs.bench.training.workers import of_two
from jobs.display import print_table
from pipeline.errors import ConfigError
from pipeline.training.checkpoints import CheckpointWriter
from pipeline.training.trainer import Trainer

FLOORS = Path(__file__).parent.parent / "results" / "train-floors.json"
FLOPS = 6  # of a training step, for each parameter and token
WARM_UP = 3
GIB = 2**30
SHOWN = 500  # characters of an error
HEADER = (
    "step",
    "ms",
    "of baseline",
    "optimizer, ms",
    "tokens/s",
    "of peak",
    "launches",
    "waits",
    "peak GiB",
    "first, s",
)
GPU_SHAPE = {"length": 512, "batch": 32, "steps": 8}
CPU_SHAPE = {"length": 128, "batch": 16, "steps": 1}
QUANTIZING, ORTHOGONALISING, WORKERS = "fake-quantization", "Newton-Schulz", "two workers"
STAGES = {"tokenize": tokenizing, "evaluate": evaluating, "pack": packing}
RATIOS_BESIDE = (
    (QUANTIZING, "of_torchao", "fake-quantization, of torchao's"),
    (ORTHOGONALISING, "of_fp32_avx2", "Newton-Schulz in bf16, of fp32, with AVX2 alone"),
    (WORKERS, "of_ideal", "two workers, of the ideal"),
    *((stage, "speed", f"{stage}, of the least") for stage in STAGES),
)
OF_TWO: dict[str, tuple[str, str, Callable[[float, float, float], float]]] = {  # rows, of their times and the teacher's
    "micro_batch a quarter, of the whole": (kinds.CACHED, kinds.IN_PARTS, lambda whole, parts, _: parts / whole),
    "contrast, share of a step": (kinds.CACHED, kinds.NO_CONTRAST, lambda ours, without, _: ours / without - 1),
    **{
        f"cached of what it could be: {preset}": (*rows, lambda cached, online, spared: (online - spared) / cached)
        for preset, rows in (
            ("paper", (kinds.CACHED, kinds.ONLINE)),
            ("best", (kinds.BEST_CACHED, kinds.BEST_ONLINE)),
        )
    },
}
BESIDE: dict[str, Callable[[Shape, int], dict[str, Any]]] = {  # the rows, on a CPU
    QUANTIZING: lambda shape, rounds: fake_quantization(shape.width, shape.tokens, rounds),
    ORTHOGONALISING: lambda shape, rounds: orthogonalising(rounds),
    WORKERS: of_two,
    **STAGES,
}


@dataclass(frozen=True)
class Extent:
    """How much is measured: steps of a round, rounds of a row, and which rows."""

    steps: int
    rounds: int
    only: tuple[str, ...] = ()
    profile: bool = False

    def names(self, baseline: str) -> list[str]:
        """Return the rows that are measured, in the order of the table; the baseline always is, as the first."""
        return [baseline, *(name for name in ROWS if name != baseline and self.wants(name))]

    def wants(self, name: str) -> bool:
        """Tell whether something is measured, where it is chosen what is."""
        return not self.only or name in self.only


def chosen_rows(only: Sequence[str] | None) -> tuple[str, ...]:
    """Return the rows by name. Raises ConfigError for a name that is none."""
    for name in only or ():
        if name not in (*ROWS, *BESIDE):
            raise ConfigError(f"--only {name!r} is no row of this bench; valid: {'; '.join((*ROWS, *BESIDE))}")
    return tuple(only or ())


def compare(
    shape: Shape, device: torch.device, compiled: bool | None, extent: Extent, out: Path, console: Console
) -> dict[str, Any]:
    """Measure every row, print and write the table; returns the document of `--json`, which `out` has as train.json."""
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {**described(device), "shape": asdict(shape), "extent": asdict(extent)}
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, OwnStore(Path(folder)) as store:
        steps = Steps(store, shape, device, compiled)
        baseline = kinds.COMPILED if device.type == "cuda" else kinds.PLAIN
        document |= {"parameters": steps.parameters, "peak_tflops": peak_flops(device) / 1e12, "baseline": baseline}
        document |= {"teacher": steps.fill_cache(), "rows": rows, "failed": failed}
        beside: Case | None = None
        for name in extent.names(baseline):
            console.print(f"{name} ...")
            try:
                case, row = _measured(name, steps, beside, extent, out)
            except Exception as error:
                if beside is None:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                console.print(f"{name} failed: {failed[name][:SHOWN]}")
                continue
            rows[name] = row | _rates(row["ms"]["median"], document, shape)
            beside = beside or case
            console.print(f"{name}: {rows[name]['ms']['median']:.1f} ms a step")
            del case
            document["ratios"] = ratios(document)  # written after each row, lest a time limit leaves nothing
            (out / "train.json").write_text(json.dumps(document, indent=1) + "\n")
            (out / "train.md").write_text(_markdown(document))
    if device.type == "cpu":
        document |= {name: work(shape, extent.rounds) for name, work in BESIDE.items() if extent.wants(name)}
        document["ratios"] = ratios(document)
        (out / "train.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / "train.md").write_text(_markdown(document))
    print_table(console, HEADER, _cells(document), title=document["device"])
    for name, value in document["ratios"].items():
        console.print(f"{name}: {value:.3f}")
    return document


def _measured(name: str, steps: Steps, beside: Case | None, extent: Extent, out: Path) -> tuple[Case, dict[str, Any]]:
    """Make a row and measure it in turn with the baseline; without one it is the baseline itself."""
    device, begun = steps.device, time.perf_counter()
    memory = Memory(device)
    case = ROWS[name](steps)
    case.take(0)
    wait(device)
    row: dict[str, Any] = {"first_step_s": time.perf_counter() - begun}
    for step in range(1, WARM_UP):
        case.take(step)
    row["peak_bytes"] = memory.peak_of(case.take, WARM_UP)
    times: list[float] = []
    baseline_times: list[float] = []
    for turn in range(extent.rounds):
        first = WARM_UP + 1 + turn * extent.steps
        if beside is not None:
            baseline_times.append(seconds_a_step(beside.take, first, extent.steps, device))
        times.append(seconds_a_step(case.take, first, extent.steps, device))
    row["ms"] = asdict(Spread.of([1e3 * seconds for seconds in times]))
    row["of_baseline"] = asdict(
        Spread.of([ours / its for ours, its in zip(times, baseline_times or times, strict=True)])
    )
    last = WARM_UP + 1 + extent.rounds * extent.steps
    row |= counted(case.take, last, device)
    row["optimizer_ms"] = 1e3 * seconds_a_step(case.optimize, last, 1, device)
    if extent.profile:
        (out / f"profile-{name.replace(', ', '-').replace(' ', '-')}.txt").write_text(
            top_table(case.take, last, device)
        )
    if case.trainer is not None:
        if name == kinds.CACHED:
            row |= _beside_steps(case.trainer, device)
        case.trainer.rows.close()
    return case, row


def _beside_steps(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Return the seconds of a validation, of a second checkpoint, and those of it that training waits for."""
    seconds = {"validation_s": seconds_a_step(lambda step: trainer.validate(), 0, 1, device)}
    with CheckpointWriter(trainer.job.dir, device) as writer:

        def keep(step: int) -> None:
            writer.begin(trainer._tensors(), trainer.progress)

        keep(0)  # which finds room for copies
        writer.wait()
        begun = time.perf_counter()
        seconds["checkpoint_waits_s"] = seconds_a_step(keep, 0, 1, device)
        writer.wait()
        return seconds | {"checkpoint_s": time.perf_counter() - begun}


def _rates(milliseconds: float, document: dict[str, Any], shape: Shape) -> dict[str, float]:
    """Return what follows from the time of a step."""
    rate = 1e3 * shape.tokens / milliseconds
    return {"tokens_per_s": rate, "of_peak": FLOPS * document["parameters"] * rate / (1e12 * document["peak_tflops"])}


def ratios(document: dict[str, Any]) -> dict[str, float]:
    """Return the ratios that floors are of, by name. Two rows are compared by their times over the baseline's in their
    own rounds.

    "cached of what it could be" is the time of an online step, less the teacher and with its head alone, over that of a
    cached one: what reading states costs beside computing. "step before its optimizer" leaves out on both sides what
    takes as long for one token as for a million.
    """
    rows, baseline = document["rows"], document["baseline"]
    times = {name: row["of_baseline"]["median"] for name, row in rows.items()}
    given: dict[str, float] = {}
    before = {name: 1 - row["optimizer_ms"] / row["ms"]["median"] for name, row in rows.items()}
    for name, row in rows.items():
        if name != baseline:
            given[f"step: {name}"] = times[name]
            given[f"step before its optimizer: {name}"] = times[name] * before[name] / before[baseline]
            given[f"launches: {name}"] = row["launches"] / rows[baseline]["launches"]
            given[f"memory: {name}"] = row["peak_bytes"] / rows[baseline]["peak_bytes"]
    teacher = document["teacher"]
    given["cache, of the bare forward"] = teacher["cache_tokens_per_s"] / teacher["forward_tokens_per_s"]
    spared = teacher["forward_ms"] / rows[baseline]["ms"]["median"]
    for ratio, (first, second, of) in OF_TWO.items():
        if {first, second} <= set(times):
            given[ratio] = of(times[first], times[second], spared)
    for name, measure, ratio in RATIOS_BESIDE:
        if measure in document.get(name, {}):
            given[ratio] = document[name][measure]
    return given


def rows_of(ratio: str) -> set[str]:
    """Return the rows that a ratio is computed of, beside the baseline and the teacher, which always are measured."""
    beside = {name for name, _, named in RATIOS_BESIDE if named == ratio}
    _, _, row = ratio.partition(": ")
    return set(OF_TWO[ratio][:2] if ratio in OF_TWO else ()) or beside or ({row} if row else set())


def shortfalls(document: dict[str, Any], floors: dict[str, Any]) -> list[str]:
    """Return a line for each ratio that misses its bound, or was not measured though its rows were chosen."""
    measured, missed = document["ratios"], [f"{name} failed" for name in document["failed"]]
    only = set(document["extent"]["only"])
    for bound, better in (("at_most", 1), ("at_least", -1)):
        for name, limit in floors[bound].items():
            if only and not rows_of(name) <= only:
                continue
            if name not in measured:
                missed.append(f"{name} was not measured, and must be {bound.replace('_', ' ')} {limit:g}")
            elif better * measured[name] > better * limit:
                missed.append(f"{name} is {measured[name]:.3f}, and must be {bound.replace('_', ' ')} {limit:g}")
    return missed


def read_floors(device: torch.device) -> dict[str, Any]:
    """Return the bounds that ratios have on a device of this kind. Raises ConfigError if there are none."""
    kind, floors = described(device)["kind"], json.loads(FLOORS.read_text(encoding="utf-8"))
    if kind not in floors:
        raise ConfigError(f"--check: {FLOORS.name} has no floors for {kind!r}; it has some for {', '.join(floors)}")
    return dict(floors[kind])


def _cells(document: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table under `HEADER`."""
    return [
        [
            name,
            _spread(row["ms"], ".1f"),
            _spread(row["of_baseline"], ".2f"),
            f"{row['optimizer_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['of_peak']:.1%}",
            f"{row['launches']:,}",
            str(row.get("waits", "")),
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['first_step_s']:.1f}",
        ]
        for name, row in document["rows"].items()
    ]


def _besides(document: dict[str, Any]) -> str:
    """Return what a validation and a checkpoint take, if they were timed, and which rows failed."""
    row = document["rows"].get(kinds.CACHED, {})
    said = [f"{name}: {error[:SHOWN]}" for name, error in document["failed"].items()]
    if "checkpoint_s" in row:
        waits = f", of which training waits {row['checkpoint_waits_s']:.2f} s" if "checkpoint_waits_s" in row else ""
        said.append(f"A validation takes {row['validation_s']:.2f} s, a checkpoint {row['checkpoint_s']:.2f} s{waits}.")
    return " ".join(said)


def _spread(spread: dict[str, float], form: str) -> str:
    median, least, most = (format(spread[name], form) for name in ("median", "least", "most"))
    return f"{median} ({least}-{most})"


def _markdown(document: dict[str, Any]) -> str:
    """Return the table, what it is of, and the ratios as a page."""
    shape, teacher = document["shape"], document["teacher"]
    lines = [
        f"{document['device']}, {document['date']}, torch {document['torch']}, transformers "
        f"{document['transformers']}: a GPT-2 of {document['parameters'] / 1e6:.1f}M parameters, {shape['batch']} rows "
        f"of {shape['length']} tokens, {shape['micro_batch']} at a time, vocabulary {shape['vocab']:,}; a large "
        f"product runs at {document['peak_tflops']:.4g} TFLOP/s.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells)} |" for cells in _cells(document)),
        "",
        f"The teacher's states: {teacher['cache_tokens_per_s']:,.0f} tokens/s into the cache, "
        f"{teacher['forward_tokens_per_s']:,.0f} by its bare forward pass. {_besides(document)}",
        "",
        *(f"{name}: {json.dumps(document[name])}" for name in BESIDE if name in document),
        "",
        "| ratio | |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in document["ratios"].items()),
    ]
    return "\n".join(lines) + "\n"
