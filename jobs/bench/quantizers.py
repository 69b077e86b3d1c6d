"""`bitmill bench quantizers`: every recipe on the same teacher, tokens, steps and seeds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from jobs.bench.claims import claims
from jobs.bench.generated import generated_text
from jobs.bench.pictures import draw_cosines, draw_front
from jobs.bench.rows import ROWS, Row
from jobs.bench.summary import SHORT_HEADER, Line, lines, markdown, short_cells
from jobs.bench.trials import Score, Trial, best_rates, run_trials, trial
from jobs.display import Display
from pipeline.config.presets import LANGUAGE_MODELING
from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.flow import run as flow
from pipeline.flow.preflight import inspect
from pipeline.models.build import family_of, read_config
from pipeline.quant.spec import BitWidths
from pipeline.store.locations import scratch_dir
from pipeline.store.records import TeacherCache

RESULTS = "quantizers.json"
# What the options of the command decide of a configuration.
OPTIONS = {
    "quant.bits": "--bits",
    "distill.seed": "--seeds",
    "distill.steps": "--steps",
    "distill.epochs": "--steps",
    "distill.eval_every": "--steps",
    "distill.batch_size": "--batch-size",
    "resources.workers": "--workers",
}
# And beside them with --teacher.
TEACHER_OPTIONS = {"model.source": "--teacher", "data.source": "--data"}
TEACHER_LENGTH = 128
SOME_TEXT = "python://pydoc"  # stands for text that is not generated yet
DOCUMENTS_A_ROW = 1.15  # generated text is cut into rows and split; a little more than the rows needed


@dataclass(frozen=True)
class Extent:
    """How much a bench runs."""

    bits: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    rows: tuple[Row, ...] = ROWS
    search: bool = True  # for each row's rate; without it the one around which it would search

    def check(self) -> None:
        """Raises ConfigError for widths that leave nothing to compare."""
        if "32-32-32" in self.bits:
            raise ConfigError("--bits 32-32-32: nothing is quantized, so there is nothing to compare.")

    def steps_at(self, bits: str) -> int:
        """Optimizer steps: above 2 bits a third, because a student starts close to its teacher there."""
        return self.steps if BitWidths.parse(bits).weights == 2 else max(1, self.steps // 3)

    def rates(self, row: Row, bits: str) -> tuple[float, ...]:
        return row.rates(bits) if self.search else (row.rate(bits),)

    def laid_over(self, base: Config, bits: str) -> Config:
        """The base configuration with the steps, the rows of a step and three validations of this width."""
        steps = self.steps_at(bits)
        values = {"steps": steps, "epochs": None, "batch_size": self.batch_size, "eval_every": max(1, steps // 3)}
        return base.model_copy(update={"distill": base.distill.model_copy(update=values)})


def chosen_rows(names: Sequence[str] | None) -> tuple[Row, ...]:
    """All rows, or those of the given names. Raises ConfigError for a name that is none."""
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r} is not a row; valid: {'; '.join(known)}")
    return tuple(known[name] for name in names) if names else ROWS


def teacher_fields(teacher: Path, data: str, extent: Extent) -> dict[str, Any]:
    """A configuration for a Hugging Face directory.

    Raises:
        ConfigError: it is none, or its family is not one that the bench can train on plain text.
    """
    if not teacher.is_dir():
        raise ConfigError(
            f"--teacher {teacher}: there is no such directory; give one with config.json, *.safetensors and tokenizer."
        )
    config = read_config(teacher)
    if family_of(config).tied_embeddings:
        raise ConfigError(
            f"--teacher {teacher}: a {config.model_type} model has an encoder; the bench compares on text."
        )
    return {
        "name": "bench-" + re.sub(r"[^A-Za-z0-9._-]", "-", teacher.resolve().name),
        "model": {"source": str(teacher)},
        "task": {"block_length": min(TEACHER_LENGTH, int(getattr(config, "max_position_embeddings", TEACHER_LENGTH)))},
        "data": {"source": data},
        "cache": {"mode": "states"},
        "distill": {"steps": extent.steps},
    }


def with_generated_text(base: Config, teacher: Path, extent: Extent, console: Console) -> Config:
    """The configuration on text that the teacher generates: as much as the steps read.

    Raises:
        ConfigError: the run would fail on any text, or its task is another than plain text.
    """
    if base.task.name != LANGUAGE_MODELING:
        raise ConfigError(f"--teacher {teacher} generates plain text, and task.name is {base.task.name}; give --data.")
    plain = base.model_copy(update={"data": base.data.model_copy(update={"source": SOME_TEXT})})
    inspect(plain, scratch_dir(base.resources))
    documents = int(DOCUMENTS_A_ROW * extent.steps * extent.batch_size) + 400
    folder = Path(scratch_dir(base.resources)).expanduser()
    with console.status(f"generating {documents} texts"):
        text = generated_text(teacher, documents, base.task.block_length, 0, folder, lambda done, total: None)
    return base.model_copy(update={"data": base.data.model_copy(update={"source": str(text)})})


def compare(base: Config, extent: Extent, out: Path, console: Console, generates: Path | None = None) -> dict[str, Any]:
    """Run the comparison, write tables and pictures under `out`; returns the document of `--json`.

    Args:
        generates: the teacher that generates the text; None: the configuration has some.

    Raises:
        ConfigError: a row cannot be, no row is offered at these widths, or nothing can be written to `out`.
    """
    search = _search(base, extent)
    _say_what_is_not_offered(base, extent, console)
    _refuse_unwritable(out)
    if generates is not None:
        base = with_generated_text(base, generates, extent, console)
        search = _search(base, extent)
    shared = flow.plan(base, TeacherCache.stage)
    with Display(console) as display:
        flow.run(shared, display)
        searched = _run(search, base, "search", display)
        rates = best_rates(searched)
        repeated = _run(_repeat(base, extent, rates), base, "repeat", display)
    chosen = [s for s in searched if s.rate == rates.get((s.row, s.bits))] + repeated
    failed = _failed(searched, repeated, rates)
    sound = [score for score in chosen if (score.row, score.bits) not in failed]
    if not sound:
        raise RunError(f"Every row failed; the first: {next(iter(failed.values()))}")
    return _report(base, extent, searched, sound, failed, out, console)


def _failed(
    searched: Sequence[Score], repeated: Sequence[Score], rates: dict[tuple[str, str], float]
) -> dict[tuple[str, str], str]:
    """Rows that have no place in a table, and why: each rate failed, or a seed at the best one."""
    found: dict[tuple[str, str], str] = {}
    for s in (*(s for s in searched if (s.row, s.bits) not in rates), *(s for s in repeated if s.failure)):
        found.setdefault((s.row, s.bits), f"rate {s.rate:g}, seed {s.seed}: {s.failure}")
    return found


def _search(base: Config, extent: Extent) -> list[Trial]:
    """Each row at each rate with the first seed; rounding has no rate. Raises ConfigError if none is offered."""
    found = [
        trial(extent.laid_over(base, bits), row, bits, rate, 0)
        for bits in extent.bits
        for row in extent.rows
        if row.offered_at(bits, base.quant.overrides.values())
        for rate in extent.rates(row, bits)
    ]
    if not found:
        raise ConfigError(
            f"--only {'; '.join(row.name for row in extent.rows)}: ternary recipes need 2 bits of every matrix, and "
            f"--bits {', '.join(extent.bits)} with quant.overrides gives them more. Use --bits 2-2-8, or other rows."
        )
    return found


def _refuse_unwritable(out: Path) -> None:
    """Raises ConfigError unless `out` is a directory that can be written to, or can become one. Makes nothing."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {existing} is no directory that you may write to; give another.")


def _say_what_is_not_offered(base: Config, extent: Extent, console: Console) -> None:
    for bits in extent.bits:
        names = [row.name for row in extent.rows if not row.offered_at(bits, base.quant.overrides.values())]
        if names:
            console.print(f"not at {bits}, being ternary: {'; '.join(names)}", highlight=False)


def _repeat(base: Config, extent: Extent, rates: dict[tuple[str, str], float]) -> list[Trial]:
    """Each row at its best rate with the other seeds."""
    return [
        trial(extent.laid_over(base, bits), row, bits, rates[row.name, bits], seed)
        for bits in extent.bits
        for row in extent.rows
        if row.trained and (row.name, bits) in rates
        for seed in range(1, extent.seeds)
    ]


def _run(trials: Sequence[Trial], base: Config, what: str, display: Display) -> list[Score]:
    if not trials:
        return []
    display.started(what)
    return run_trials(
        trials, base.resources, lambda done, total, note, points=(): display.advanced(what, done, total, note)
    )


def _report(
    base: Config,
    extent: Extent,
    searched: Sequence[Score],
    sound: Sequence[Score],
    failed: dict[tuple[str, str], str],
    out: Path,
    console: Console,
) -> dict[str, Any]:
    teacher = sound[0].teacher["perplexity"]
    kept, search, failed_before = _earlier(out / RESULTS, base, extent, searched, teacher, console)
    scores, search, failed = [*kept, *sound], [*search, *map(_tried, searched)], {**failed_before, **failed}
    tables = {bits: lines(scores, bits, search) for bits in dict.fromkeys(score.bits for score in scores)}
    everything = [line for table in tables.values() for line in table]
    checked = claims(everything, base.name, failed)
    document = {
        "name": base.name,
        "teacher_perplexity": teacher,
        "steps": extent.steps,
        "batch_size": extent.batch_size,
        "block_length": base.task.block_length,
        "measured": sorted({score.measured for score in scores}),
        "steps_at": {bits: extent.steps_at(bits) for bits in tables},
        "search": search,
        "failed": [{"row": row, "bits": bits, "failure": failure} for (row, bits), failure in failed.items()],
        "claims": [asdict(claim) for claim in checked],
        "tables": {bits: [line.document() for line in table] for bits, table in tables.items()},
        "scores": [score.model_dump(mode="json") for score in scores],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tokens = extent.batch_size * base.task.block_length
    title = f"{base.name}: steps of {tokens:,} tokens; teacher's perplexity {teacher:.2f}"
    text = [f"## {bits}, {extent.steps_at(bits)} steps\n\n{markdown(table)}\n" for bits, table in tables.items()]
    left_out = [f"left out: {row} at {bits} failed at {failure}" for (row, bits), failure in failed.items()]
    said = "".join(f"- {line}\n" for line in (*checked, *left_out))
    (out / "quantizers.md").write_text("\n".join([f"# {title}\n", *text, said]), encoding="utf-8")
    draw_front(everything, title, out / "front.png")
    draw_cosines(everything, base.name, out / "cosine.png")
    for bits, table in tables.items():
        about = f"{base.name} at {bits}, {extent.steps_at(bits)} steps, teacher's perplexity {teacher:.2f}"
        _print(table, about, console)
    for said_of_it in (*checked, *left_out):
        console.print(str(said_of_it), highlight=False)
    console.print(f"written: {out}/{RESULTS}, quantizers.md, front.png, cosine.png", highlight=False)
    return document


def _tried(score: Score) -> dict[str, Any]:
    """What the search for a rate saw, nats on validation."""
    return {name: getattr(score, name) for name in ("row", "bits", "rate", "validation_nats")}


def _earlier(
    path: Path, base: Config, extent: Extent, searched: Sequence[Score], teacher: float, console: Console
) -> tuple[list[Score], list[dict[str, Any]], dict[tuple[str, str], str]]:
    """Scores of earlier benches in the same folder, of rows and widths not run now, if the same trial would be run
    today, the searches behind them, and what failed: a table may be made piece by piece. Says which are left out."""
    if not path.exists():
        return [], [], {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = [Score.model_validate(score) for score in document["scores"]]
        search = {(tried["row"], tried["bits"], tried["rate"]): dict(tried) for tried in document["search"]}
        failed = {(f["row"], f["bits"]): str(f["failure"]) for f in document["failed"]}
    except (OSError, ValueError, KeyError, TypeError):
        console.print(f"left out: all of {path}, which this version does not read")
        return [], [], {}
    now = {(score.row, score.bits) for score in searched}
    rows = {row.name: row for row in ROWS}
    kept = [
        score
        for score in found
        if (score.row, score.bits) not in now
        and score.row in rows
        and score.teacher.get("perplexity") == teacher
        and score.digest == _digest_today(base, extent, rows[score.row], score)
    ]
    of_kept = {(score.row, score.bits) for score in kept}
    for row, bits in dict.fromkeys((score.row, score.bits) for score in found):
        if (row, bits) not in of_kept | now:
            console.print(f"left out: {row} at {bits} of {path}, whose teacher, data or recipe was another")
    return (
        kept,
        [tried for (row, bits, _), tried in search.items() if (row, bits) in of_kept],
        {key: failure for key, failure in failed.items() if key not in now},
    )


def _digest_today(base: Config, extent: Extent, row: Row, score: Score) -> str | None:
    """Of the trial behind a score if it were run now; None: it cannot be run."""
    try:
        return trial(extent.laid_over(base, score.bits), row, score.bits, score.rate, score.seed).digest
    except ConfigError:
        return None


def _print(table: Sequence[Line], title: str, console: Console) -> None:
    rates = "v, ^: the lowest, the highest rate of its search; " if any(len(line.tried) > 1 for line in table) else ""
    about = f"{rates}quantizers.md has all columns"
    columns = (Column(header, overflow="fold") for header in SHORT_HEADER)
    shown = Table(*columns, title=title, caption=about, box=SIMPLE_HEAD, pad_edge=False)
    for line in table:
        shown.add_row(*short_cells(line))
    console.print(shown)
