"""`bitmill bench quantizers`: every recipe on the same teacher, tokens, steps and seeds."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.generated import generated_text
from jobs.bench.pictures import draw_cosines, draw_front
from jobs.bench.rows import ROWS, Row
from jobs.bench.summary import HEADER, Line, cells, lines, markdown
from jobs.bench.trials import Score, Trial, best_rates, run_trials, trial
from jobs.display import Display
from pipeline import flow
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.families.models import read_config
from pipeline.locations import scratch_dir
from pipeline.records import TeacherCache

RESULTS = "quantizers.json"
TEACHER_LENGTH = 128
DOCUMENTS_A_ROW = 1.15  # generated text is cut into rows and split; a little more than the rows needed


@dataclass(frozen=True)
class Extent:
    """How much a bench runs."""

    bits: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    rows: tuple[Row, ...] = ROWS


def chosen_rows(names: Sequence[str] | None) -> tuple[Row, ...]:
    """All rows, or those of the given names. Raises ConfigError for a name that is none."""
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r} is not a row; valid: {'; '.join(known)}")
    return tuple(known[name] for name in names) if names else ROWS


def teacher_fields(teacher: Path, data: str | None, extent: Extent, folder: Path, console: Console) -> dict[str, Any]:
    """A configuration for a Hugging Face directory; without `data`, on text that it generates."""
    config = read_config(teacher)
    length = min(TEACHER_LENGTH, int(getattr(config, "max_position_embeddings", TEACHER_LENGTH)))
    if data is None:
        documents = int(DOCUMENTS_A_ROW * extent.steps * extent.batch_size) + 400
        with console.status(f"generating {documents} texts"):
            data = str(generated_text(teacher, documents, length, 0, folder, lambda done, total: None))
    return {
        "name": f"bench-{teacher.name}",
        "model": {"source": str(teacher)},
        "task": {"block_length": length},
        "data": {"source": data},
        "cache": {"mode": "states"},
        "distill": {"steps": extent.steps},
    }


def compare(base: Config, extent: Extent, out: Path, console: Console) -> dict[str, Any]:
    """Run the comparison, write tables and pictures under `out`; returns the document of `--json`."""
    for bits in extent.bits:
        if bits == "32-32-32":
            raise ConfigError(f"--bits {bits}: nothing is quantized, so there is nothing to compare.")
    distill = {"steps": extent.steps, "epochs": None, "batch_size": extent.batch_size}
    distill["eval_every"] = max(1, extent.steps // 3)
    base = base.model_copy(update={"distill": base.distill.model_copy(update=distill)})
    with Display(console) as display:  # what all trials share
        flow.run(flow.plan(base, TeacherCache.stage), display)
        searched = _run(_search(base, extent), base, "search", display)
        rates = best_rates(searched)
        _refuse_failures(searched, rates)
        repeated = _run(_repeat(base, extent, rates), base, "repeat", display)
    _refuse_failures(repeated, rates)
    chosen = [s for s in searched if s.rate == rates[s.row, s.bits]] + repeated
    return _report(base, extent, chosen, out, console)


def _search(base: Config, extent: Extent) -> list[Trial]:
    """Each row at each rate with the first seed; rounding has no rate."""
    return [
        trial(base, row, bits, rate, 0)
        for bits in extent.bits
        for row in extent.rows
        if row.offered_at(bits)
        for rate in row.rates(bits)
    ]


def _repeat(base: Config, extent: Extent, rates: dict[tuple[str, str], float]) -> list[Trial]:
    """Each row at its best rate with the other seeds."""
    return [
        trial(base, row, bits, rates[row.name, bits], seed)
        for bits in extent.bits
        for row in extent.rows
        if row.offered_at(bits) and row.trained
        for seed in range(1, extent.seeds)
    ]


def _refuse_failures(scores: Sequence[Score], rates: dict[tuple[str, str], float]) -> None:
    """Raises RunError for a trial that failed at its row's best rate; elsewhere it only lost the search."""
    for score in scores:
        if score.failure and score.rate == rates[score.row, score.bits]:
            raise RunError(
                f"The row {score.row} at {score.bits}, rate {score.rate:g}, seed {score.seed}, failed: {score.failure} "
                "The other trials are kept; leave the row out with --only."
            )


def _run(trials: Sequence[Trial], base: Config, what: str, display: Display) -> list[Score]:
    if not trials:
        return []
    display.started(what)
    return run_trials(
        trials, base.resources, lambda done, total, note, points=(): display.advanced(what, done, total, note)
    )


def _report(base: Config, extent: Extent, scores: Sequence[Score], out: Path, console: Console) -> dict[str, Any]:
    teacher = scores[0].teacher["perplexity"]
    identity = {
        "name": base.name,
        "teacher_perplexity": teacher,
        "steps": extent.steps,
        "batch_size": extent.batch_size,
        "block_length": base.task.block_length,
    }
    scores = [*_earlier(out / RESULTS, identity, scores), *scores]
    tables = {bits: lines(scores, bits) for bits in dict.fromkeys(score.bits for score in scores)}
    document = {
        **identity,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {base.resources.workers} workers of {base.resources.cpus_per_worker:g} CPU",
        "rates": {row.name: {bits: row.rates(bits) for bits in tables} for row in ROWS},
        "tables": {bits: [line.document() for line in table] for bits, table in tables.items()},
        "scores": [score.model_dump(mode="json") for score in scores],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    title = _title(base, extent, teacher)
    text = [f"## {bits}\n\n{markdown(table)}\n" for bits, table in tables.items()]
    (out / "quantizers.md").write_text(f"# {title}\n\n" + "\n".join(text), encoding="utf-8")
    everything = [line for table in tables.values() for line in table]
    draw_front(everything, title, out / "front.png")
    draw_cosines(everything, base.name, out / "cosine.png")
    for bits, table in tables.items():
        _print(table, f"{base.name} at {bits}, teacher's perplexity {teacher:.2f}", console)
    console.print(f"written: {out}/{RESULTS}, quantizers.md, front.png, cosine.png", highlight=False)
    return document


def _earlier(path: Path, identity: dict[str, Any], scores: Sequence[Score]) -> list[Score]:
    """Scores of a bench of the same teacher, tokens and steps in the same folder, of rows and widths not run now: a
    table may be made piece by piece."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        same = all(document[name] == value for name, value in identity.items())
        found = [Score.model_validate(score) for score in document["scores"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    now = {(score.row, score.bits) for score in scores}
    return [score for score in found if (score.row, score.bits) not in now] if same else []


def _title(base: Config, extent: Extent, teacher: float) -> str:
    tokens = extent.batch_size * base.task.block_length
    seeds = f"{extent.seeds} seed{'s' if extent.seeds > 1 else ''}"
    return f"{base.name}: {extent.steps} steps of {tokens:,} tokens, {seeds}; teacher's perplexity {teacher:.2f}"


def _print(table: Sequence[Line], title: str, console: Console) -> None:
    shown = Table(*HEADER, title=title)
    for line in table:
        shown.add_row(*cells(line))
    console.print(shown)


def scratch_of(base_resources: Any) -> Path:
    """Where generated text is kept."""
    return Path(scratch_dir(base_resources)).expanduser()
