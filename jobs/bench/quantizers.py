"""`bitmill bench quantizers`: every recipe on the same teacher, tokens, steps and seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column

from jobs.bench.claims import claims
from jobs.bench.documents import Documents, averaged, read_documents, written
from jobs.bench.generated import generated_text
from jobs.bench.pictures import cosine_figure, front_figure
from jobs.bench.rows import EVERY_ROW, ROWS, Key, Row, Try, rows_at
from jobs.bench.students import BenchRun, Score, Tried, bench_run, best_tries, train_all
from jobs.bench.summary import SHORT_HEADER, Line, lines, markdown, short_cells
from jobs.display import Display, print_table, print_warnings
from pipeline.config.presets import LANGUAGE_MODELING
from pipeline.config.run import Config
from pipeline.errors import ConfigError, RunError
from pipeline.flow.plan import plan_run
from pipeline.flow.preflight import inspect, pin
from pipeline.flow.run import run_plan
from pipeline.models.build import read_config
from pipeline.models.family import family_for
from pipeline.quant.granularity import GROUP_SIZES, Granularity
from pipeline.quant.spec import BitWidths
from pipeline.store.locations import scratch_dir
from pipeline.store.records import TeacherCache

RESULTS, DOCUMENTS = "quantizers.json", "documents.json"
SEARCH_SEED = 0  # chooses what each row is measured at, and is none of the seeds that measure
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

    def steps_at(self, bits: str) -> int:
        """Count the optimizer steps: above 2 bits a third, because a student starts close to its teacher there."""
        return self.steps if BitWidths.parse(bits).weights == 2 else max(1, self.steps // 3)

    @property
    def own_tries(self) -> dict[Key, Try]:
        """Return what each row takes that is not searched for: without a search all, else rounding."""
        own = [row for row in self.rows if not (self.search and row.trained)]
        return {(row.name, bits): row.own_try(bits) for bits in self.bits for row in own}

    def seeds_of(self, row: Row) -> list[int]:
        """Return the seeds that measure a row; rounding has no use for more than one."""
        return list(range(SEARCH_SEED + 1, SEARCH_SEED + 1 + (self.seeds if row.trained else 1)))

    def laid_over(self, base: Config, bits: str) -> Config:
        """Return the base configuration with the steps, the rows of a step and three validations of this width."""
        steps = self.steps_at(bits)
        values = {"steps": steps, "epochs": None, "batch_size": self.batch_size, "eval_every": max(1, steps // 3)}
        return base.model_copy(update={"distill": base.distill.model_copy(update=values)})


def chosen_rows(names: Sequence[str] | None, granularities: Sequence[str] | None = None) -> tuple[Row, ...]:
    """Return the published rows, or every quantizer at the granularities; of these only the rows that are named.
    Raises ConfigError for a name that is no row, or a granularity that is not known."""
    rows = [row for text in granularities or () for row in rows_at(_granularity(text))] or list(ROWS)
    known = {row.name: row for row in rows}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r} is not a row; valid: {'; '.join(known)}")
    return tuple(known[name] for name in names) if names else tuple(known.values())


def _granularity(text: str) -> Granularity:
    """Read per_channel, or per_group=64."""
    kind, _, size = text.partition("=")
    try:
        return Granularity.parse({kind: int(size)} if size else kind)
    except ValueError as error:
        sizes = ", ".join(f"per_group={size}" for size in GROUP_SIZES)
        raise ConfigError(f"--granularity is {text!r}; valid: per_tensor, per_channel, {sizes}") from error


def teacher_fields(teacher: Path, data: str, extent: Extent) -> dict[str, Any]:
    """Return the fields of a configuration for a Hugging Face directory. Raises ConfigError if it is none, or its
    family is not one that the bench can train on plain text."""
    if not teacher.is_dir():
        raise ConfigError(
            f"--teacher {teacher}: there is no such directory; give one with config.json, *.safetensors and tokenizer."
        )
    config = read_config(teacher)
    kind = config.model_type
    if family_for(kind).encoder_decoder:
        raise ConfigError(f"--teacher {teacher}: a {kind} model has an encoder; the bench compares on text.")
    return {
        "name": "bench-" + re.sub(r"[^A-Za-z0-9._-]", "-", teacher.resolve().name),
        "model": {"source": str(teacher)},
        "task": {"block_length": min(TEACHER_LENGTH, int(getattr(config, "max_position_embeddings", TEACHER_LENGTH)))},
        "data": {"source": data},
        "cache": {"mode": "states"},
        "distill": {"steps": extent.steps},
    }


def with_generated_text(base: Config, teacher: Path, extent: Extent, console: Console) -> Config:
    """Return the configuration on text that the teacher generates: as much as the steps read. Raises ConfigError if
    the run would fail on any text, or its task is another than plain text."""
    if base.task.name != LANGUAGE_MODELING:
        raise ConfigError(f"--teacher {teacher} generates plain text, and task.name is {base.task.name}; give --data.")

    def reading(source: str) -> Config:
        return base.model_copy(update={"data": base.data.model_copy(update={"source": source})})

    inspect(pin(reading(SOME_TEXT)))
    documents = int(DOCUMENTS_A_ROW * extent.steps * extent.batch_size) + 400
    folder = Path(scratch_dir(base.resources)).expanduser()
    with Display(console) as display, display.stage("generate") as advance:
        text = generated_text(teacher, documents, base.task.block_length, 0, folder, advance)
    return reading(str(text))


def compare(base: Config, extent: Extent, out: Path, console: Console, generates: Path | None = None) -> dict[str, Any]:
    """Run the comparison, write tables and pictures under `out`; returns the document of `--json`. `generates` is the
    teacher that generates the text; None: the configuration has some. Raises ConfigError if a row cannot be, no row is
    offered at these widths, or nothing can be written to `out`."""
    _search(base, extent)  # refuses what cannot be
    for bits in extent.bits:
        if names := [row.name for row in extent.rows if not row.offered_at(bits, base.quant.overrides.values())]:
            console.print(f"not at {bits}, being ternary: {'; '.join(names)}")
    if generates is not None:
        base = with_generated_text(base, generates, extent, console)
    print_warnings(console, plan_run(base).warnings)
    with Display(console) as display:
        run_plan(plan_run(base, TeacherCache.stage), display)
        searched = train_all(_search(base, extent) if extent.search else [], Tried, base.resources, display, "search")
        chosen = extent.own_tries | best_tries(searched)
        measured = train_all(_measure(base, extent, chosen), Score, base.resources, display, "measure")
    failed = _failed(searched, measured, chosen)
    sound = [score for score in measured if score.key not in failed]
    if not sound:
        raise RunError(f"Every row failed; the first: {next(iter(failed.values()))}")
    return _report(base, extent, searched, sound, failed, out, console)


def _failed(searched: Sequence[Tried], measured: Sequence[Score], chosen: Mapping[Key, Try]) -> dict[Key, str]:
    """Return the rows that have no place in a table, and why: each try failed, or a seed at the best one."""
    reasons: dict[Key, str] = {}
    for s in (*(s for s in searched if s.key not in chosen), *(s for s in measured if s.failure)):
        reasons.setdefault(s.key, f"rate {s.rate:g}, seed {s.seed}: {s.failure}")
    return reasons


def _search(base: Config, extent: Extent) -> list[BenchRun]:
    """Return each row that trains at each try, with a seed that measures nothing. Raises ConfigError if no row is
    offered, or one cannot be."""
    offered = [
        (row, bits)
        for bits in extent.bits
        for row in extent.rows
        if row.offered_at(bits, base.quant.overrides.values())
    ]
    if not offered:
        raise ConfigError(
            f"--only {'; '.join(row.name for row in extent.rows)}: ternary recipes need 2 bits of every matrix, and "
            f"--bits {', '.join(extent.bits)} with quant.overrides gives them more. Use --bits 2-2-8, or other rows."
        )
    runs = [
        (row, bench_run(extent.laid_over(base, bits), row, bits, tried, SEARCH_SEED))
        for row, bits in offered
        for tried in row.tries(bits)
    ]
    return [run for row, run in runs if row.trained]  # rounding, which has nothing to choose, is only refused


def _measure(base: Config, extent: Extent, chosen: Mapping[Key, Try]) -> list[BenchRun]:
    """Return each row at what was chosen for it with every seed; rounding has no use for more than one."""
    return [
        bench_run(extent.laid_over(base, bits), row, bits, chosen[row.name, bits], seed)
        for bits in extent.bits
        for row in extent.rows
        if (row.name, bits) in chosen and row.offered_at(bits, base.quant.overrides.values())
        for seed in extent.seeds_of(row)
    ]


def _report(
    base: Config,
    extent: Extent,
    searched: Sequence[Tried],
    sound: Sequence[Score],
    failed: dict[Key, str],
    out: Path,
    console: Console,
) -> dict[str, Any]:
    teacher = sound[0].teacher["perplexity"]
    earlier = _earlier(out, base, extent, {*failed, *(tried.key for tried in (*searched, *sound))}, sound[0], console)
    search = earlier.search + [
        tried.model_dump(include={"row", "bits", "rate", "contrast_weight", "validation_nats"}) for tried in searched
    ]
    scores, failed = [*earlier.scores, *sound], {**earlier.failed, **failed}
    texts = earlier.documents | averaged([(s.key, s.documents) for s in sound if s.documents is not None])
    widths = dict.fromkeys(score.bits for score in scores)
    tables = {bits: lines(scores, bits, texts, search) for bits in widths}
    everything = [line for table in tables.values() for line in table]
    checked = claims(everything, base.name, failed)
    steps = {bits: extent.steps_at(bits) for bits in tables}
    document = {
        "name": base.name,
        "teacher_perplexity": teacher,
        "steps": extent.steps,
        "batch_size": extent.batch_size,
        "block_length": base.task.block_length,
        "measured": sorted({score.measured for score in scores}),
        "steps_at": steps,
        "search": search,
        "failed": [{"row": row, "bits": bits, "failure": failure} for (row, bits), failure in failed.items()],
        "claims": [asdict(claim) for claim in checked],
        "tables": {bits: [asdict(line) for line in table] for bits, table in tables.items()},
        "scores": [score.model_dump(mode="json", exclude={"documents"}) for score in scores],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / DOCUMENTS).write_text(written(texts), encoding="utf-8")
    tokens = extent.batch_size * base.task.block_length
    title = f"{base.name}: steps of {tokens:,} tokens; teacher's perplexity {teacher:.2f}"
    text = [f"## {bits}, {steps[bits]} steps\n\n{markdown(table)}\n" for bits, table in tables.items()]
    said = [str(claim) for claim in checked]
    said += [f"left out: {row} at {bits} failed at {failure}" for (row, bits), failure in failed.items()]
    text.append("".join(f"- {line}\n" for line in said))
    (out / "quantizers.md").write_text("\n".join([f"# {title}\n", *text]), encoding="utf-8")
    front_figure(everything, title).savefig(out / "front.png", dpi=130)
    cosine_figure(everything, base.name).savefig(out / "cosine.png", dpi=130)
    for bits, table in tables.items():
        _print(table, f"{base.name} at {bits}, {steps[bits]} steps, teacher's perplexity {teacher:.2f}", console)
    for line in said:
        console.print(line)
    console.print(f"written: {out}/{RESULTS}, {DOCUMENTS}, quantizers.md, front.png, cosine.png")
    return document


@dataclass(frozen=True)
class Earlier:
    """What earlier benches left in the same folder, of rows and widths not run now, that would be the same today: so a
    table may be made piece by piece."""

    scores: list[Score] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)  # behind them
    failed: dict[Key, str] = field(default_factory=dict)
    documents: dict[Key, Documents] = field(default_factory=dict)


def _earlier(out: Path, base: Config, extent: Extent, now: Set[Key], sound: Score, console: Console) -> Earlier:
    """Return what still holds beside the rows of `now`, of which `sound` is a score; says what is left out."""
    if not (out / RESULTS).exists():
        return Earlier()
    try:
        document = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        scores = [Score.model_validate(score) for score in document["scores"]]
        search = [dict(entry) for entry in document["search"]]
        failed = {(f["row"], f["bits"]): str(f["failure"]) for f in document["failed"]}
        texts = read_documents((out / DOCUMENTS).read_text(encoding="utf-8"))
        seeds = {key: [score.seed for score in scores if score.key == key] for key in {s.key for s in scores}}
        kept = [
            score
            for score in scores
            if score.key not in now
            and score.row in EVERY_ROW
            and (score.bits not in extent.bits or seeds[score.key] == extent.seeds_of(EVERY_ROW[score.row]))
            and score.teacher.get("perplexity") == sound.teacher["perplexity"]
            and score.key in texts
            and score.digest == _digest_today(base, extent, EVERY_ROW[score.row], score)
        ]
    except (OSError, ValueError, KeyError, TypeError):
        console.print(f"left out: all of {out / RESULTS}, which this version does not read", markup=False)
        return Earlier()
    of_kept = dict.fromkeys(score.key for score in kept)
    for row, bits in dict.fromkeys(score.key for score in scores):
        if (row, bits) not in {*of_kept, *now}:
            console.print(
                f"left out: {row} at {bits} of {out / RESULTS}, whose teacher, data, seeds or recipe was another"
            )
    return Earlier(
        scores=kept,
        search=[entry for entry in search if (entry["row"], entry["bits"]) in of_kept],
        failed={key: failure for key, failure in failed.items() if key not in now},
        documents={key: texts[key] for key in of_kept},
    )


def _digest_today(base: Config, extent: Extent, row: Row, score: Score) -> str | None:
    """Return the digest of the run behind a score if it were run now; None: it cannot be run."""
    try:
        return bench_run(extent.laid_over(base, score.bits), row, score.bits, score.tried, score.seed).digest
    except ConfigError:
        return None


def _print(table: Sequence[Line], title: str, console: Console) -> None:
    rates = "v, ^: the lowest, the highest rate of its search; " if any(len(line.tried) > 1 for line in table) else ""
    columns = (Column(header, overflow="fold") for header in SHORT_HEADER)
    caption = f"{rates}95 % intervals over [seeds] and {{documents}}; quantizers.md has all columns"
    style = {"title": title, "caption": caption, "box": SIMPLE_HEAD, "pad_edge": False}
    print_table(console, columns, map(short_cells, table), **style)
