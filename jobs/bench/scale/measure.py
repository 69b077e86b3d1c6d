"""`bitmill bench scale`: what a corpus ten times as large takes, and a store and a registry that have grown for years,
of which a run, a sweep of a thousand trials, a lookup and `gc` ask.

Seconds are of the CPU, over all threads, so that what else a machine does changes them little; memory is the most that
the process had resident while a stage ran, libraries and all, each stage in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from jobs.bench.scale.worker import language, peak_bytes
from jobs.display import print_table
from pipeline.config.run import Config
from pipeline.config.sweep import MOST_TRIALS, Sweep
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.provenance import provenance
from pipeline.retrain.gc import Collector
from pipeline.sources.content import ContentMemo
from pipeline.store.lease import LEASE
from pipeline.store.locations import tracking_uri
from pipeline.store.step_store import RECORD
from pipeline.sweep.run import plan_sweep
from pipeline.tracking.listener import SilentListener
from pipeline.tracking.lookup import lookup
from pipeline.tracking.runs import sqlite_file

MIB = 2**20
TIMES = (1, 2, 5, 10)  # as large as the smallest corpus
STAGES = ("tokenize", "cache")
HEADER = ("stage", "text, MiB", "rows", "CPU, s", "MiB before it", "memory, MiB")
MOST_MEMORY, MOST_TIME = 1.20, 1.15  # of ten times the text: of the memory of one, and of ten times its seconds
LEAST_MIB = 1.0  # of a stage's own: a small one may find all that it needs let go before
# Of the CPU, with 100,000 objects and 20,000 versions
LIMITS_S = {"plan": 1.0, "sweep": 30.0, "lookup": 30.0, "gc": 45.0, "delete": 45.0}
FILES_S = 120.0  # of the CPU, to learn what 100,000 files hold
DELETED = 32  # steps, in one go
CLONED = ("runs", "model_versions", "model_version_tags", "logged_models", "logged_model_tags", "logged_model_metrics")


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what work gives in a process of its own, which an interruption ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BaseException:
            for process in active_children():  # else it would be waited for
                process.kill()
            raise


def measure(
    mib: float, objects: int, versions: int, out: Path, console: Console, run: Callable[..., Any] = alone
) -> dict[str, Any]:
    """Measure all, each by `run`, print it, and write scale.json and scale.png; returns the document of `--json`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        stages: list[dict[str, Any]] = []
        for times in TIMES:
            console.print(f"text of {times * mib:g} MiB: {' and '.join(STAGES)}")
            stages += _stages(Path(folder) / str(times), times * mib, run)
        console.print(f"a store of {objects:,} objects and a registry of {versions:,} versions")
        large = run(_large, Path(folder) / "large", objects, versions)
        console.print(f"the contents of {objects:,} files, twice")
        files = run(pinned, Path(folder) / "files", objects)
        document = {"provenance": provenance(), "stages": stages, "growth": growth(stages), "large": large}
        document["files"] = files
        (out / "scale.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        figure(stages).savefig(out / "scale.png", dpi=120)  # before so many files are cleared away
    print_table(console, HEADER, map(cells, stages))
    for stage, grown in document["growth"].items():
        console.print(
            f"{stage}: ten times the text takes {grown['time']:.2f} times as long a MiB, "
            f"and {grown['memory']:.2f} times the memory beside what there was before"
        )
    asked = [(name, f"{large[name]['cpu_s']:.2f}", f"{limit:g}") for name, limit in LIMITS_S.items()]
    console.print(
        f"{large['objects']:,} objects, {large['versions']:,} versions; {large['garbage']:,} steps may go; "
        f"a sweep of {large['trials']:,} trials"
    )
    print_table(console, ("asked", "CPU, s", "limit, s"), asked)
    seconds = f"{files['first_s']:.1f} s of the CPU, {FILES_S:g} are too many, and again {files['again_s']:.1f}"
    console.print(f"what {files['files']:,} files hold is learned in {seconds}")
    return document


def growth(stages: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by stage, how many times as long a MiB takes in the largest corpus as in the smallest, and how many times
    the memory it takes, beside what the process held before."""
    grown = {}
    for stage in STAGES:
        of_stage = sorted((row for row in stages if row["stage"] == stage), key=lambda row: row["mib"])
        least, most = of_stage[0], of_stage[-1]
        a_mib = [row["cpu_s"] / row["mib"] for row in (least, most)]
        own = [max(LEAST_MIB, row["peak_mib"] - row["idle_mib"]) for row in (least, most)]
        grown[stage] = {"time": a_mib[1] / a_mib[0], "memory": own[1] / own[0]}
    return grown


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a measured stage as a line of the table."""
    memory = f"{row['idle_mib']:,.0f}", f"{row['peak_mib']:,.0f}"
    return row["stage"], f"{row['mib']:g}", f"{row['rows']:,}", f"{row['cpu_s']:.1f}", *memory


def figure(stages: list[dict[str, Any]]) -> Figure:
    """Draw seconds and memory of each stage over the size of the corpus."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"cpu_s": "CPU, s", "peak_mib": "memory, MiB"}
    for axes, (measured, label) in zip(drawn.subplots(1, 2), labels.items(), strict=True):
        for stage in STAGES:
            of_stage = [row for row in stages if row["stage"] == stage]
            axes.plot([row["mib"] for row in of_stage], [row[measured] for row in of_stage], marker="o", label=stage)
        axes.set(xlabel="text, MiB", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.grid(visible=True, linewidth=0.3)
        axes.legend()
    return drawn


def _stages(folder: Path, mib: float, run: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yield what each stage took on a corpus of so many MiB."""
    folder.mkdir()
    _write_corpus(folder / "corpus.txt", int(mib * MIB))
    for stage, until in (("tokenize", "finetune"), ("cache", "cache")):
        yield {"stage": stage, "mib": mib, **run(_stages_up_to, until, _fields(folder, vocabulary=4096))[stage]}


def _write_corpus(path: Path, size: int) -> None:
    """Write paragraphs of words as frequent as those of a language."""
    draw = random.Random(0)
    words, weights = language(draw)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            written += file.write(" ".join(draw.choices(words, weights, k=60)) + "\n\n")


def _fields(folder: Path, vocabulary: int) -> dict[str, Any]:
    """Return a run of a small model in one process, its files below a folder."""
    training = {"steps": 1, "batch_size": 4, "lr": 1e-3}
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 1, "n_positions": 128}
    return {
        "name": "scale",
        "model": {"source": {"architecture": "gpt2", **shape}, "tokenizer": {"train_bpe": vocabulary}},
        "task": {"block_length": 128},
        "data": {"source": str(folder / "corpus.txt")},
        "finetune": training,
        "cache": {"mode": "states"},
        "distill": training,
        "resources": {
            "workers": 0,
            "storage_uri": str(folder / "store"),
            "local_cache_dir": str(folder / "scratch"),
        },
    }


class _Gauge(SilentListener):
    """Measures each stage that runs."""

    def __init__(self) -> None:
        self.measured_stages: dict[str, dict[str, float]] = {}
        self._idle, self._begun = 0, 0.0

    def started(self, stage: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # from here the kernel's peak counts anew
        self._idle, self._begun = peak_bytes(), time.process_time()

    def finished(self, stage: str, status: str, seconds: float) -> None:
        seconds, most = time.process_time() - self._begun, peak_bytes()
        self.measured_stages[stage] = {"cpu_s": seconds, "idle_mib": self._idle / MIB, "peak_mib": most / MIB}


def _stages_up_to(until: str, fields: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Run the line up to a stage, and return what each stage took that ran."""
    import torch

    torch.set_num_threads(1)
    gauge = _Gauge()
    outcome = run_plan(plan_run(Config.model_validate(fields), until), gauge)
    rows = sum(split.rows for split in outcome.steps["tokenize"].record.splits.values())
    return {stage: {"rows": rows, **took} for stage, took in gauge.measured_stages.items()}


def pinned(folder: Path, files: int) -> dict[str, float]:
    """Return the seconds of the CPU in which the contents of so many files are learned, and told again."""
    folder.mkdir()
    paths = [folder / f"{number}.txt" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text(f"{number}\n")
    given: dict[str, float] = {"files": files}
    for name in ("first_s", "again_s"):
        memo, begun = ContentMemo(str(folder / "memo")), time.process_time()
        for path in paths:
            memo.sha256(path)
        given[name] = time.process_time() - begun
    return given


def _large(folder: Path, objects: int, versions: int) -> dict[str, Any]:
    """Return what is asked of a store of so many objects, and a registry of so many versions, takes."""
    folder.mkdir()
    _write_corpus(folder / "corpus.txt", 50_000)
    config = Config.model_validate(_fields(folder, vocabulary=300))
    plan = plan_run(config)
    run_plan(plan, SilentListener())
    keys = [step.key for step in plan.steps]
    stored = _fill_store(Path(config.resources.storage_uri), [(step.name, step.key) for step in plan.steps], objects)
    _fill_registry(Path(str(sqlite_file(tracking_uri(config.resources)))), keys, versions)
    given: dict[str, Any] = {"objects": stored, "versions": versions}
    said = Console(stderr=True, highlight=False)  # minutes pass

    def timed(name: str, work: Callable[[], Any]) -> Any:
        said.print(f"{name} of {stored:,} objects and {versions:,} versions")
        before = time.process_time(), time.perf_counter()
        answer = work()
        given[name] = {"cpu_s": time.process_time() - before[0], "wall_s": time.perf_counter() - before[1]}
        return answer

    given["left"] = len(timed("plan", lambda: plan_run(config)).left)
    given["trials"] = len(timed("sweep", lambda: plan_sweep(_of_many(config))).known)
    given["found"] = len(timed("lookup", lambda: lookup(storage_uri=config.resources.storage_uri, max_size_mib=100.0)))
    collector = Collector(config.resources, 1, 0.0)
    garbage = timed("gc", collector.find)
    gone = timed("delete", lambda: collector.delete(garbage[:DELETED]))
    return {**given, "garbage": len(garbage), "deleted": len(gone), "peak_mib": peak_bytes() / MIB}


def _of_many(config: Config) -> Config:
    """Return a sweep of as many trials of a run as there may be."""
    return config.model_copy(update={"sweep": Sweep(space={"distill.seed": list(range(MOST_TRIALS))})})


def _other(key: str, number: int) -> str:
    """Return the key of a step of the run of a number, in the place of the same step's of the first."""
    return key if number == 1 else hashlib.sha256(f"{key} {number}".encode()).hexdigest()[: len(key)]


def _fill_store(store: Path, steps: list[tuple[str, str]], objects: int) -> int:
    """Put runs beside the one that is there until there are so many objects; their files are links. Return how many
    there are."""
    paths = [path for stage, key in steps for path in (store / stage / key).rglob("*") if path.is_file()]
    paths = [path for path in paths if not path.name.startswith(".")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.name in (RECORD, LEASE)}
    count, number = len(paths), 1
    while count < objects:
        number += 1
        others = {key: _other(key, number) for _, key in steps}
        for path in paths:
            stage, key, *rest = path.relative_to(store).parts
            target = store.joinpath(stage, others[key], *rest)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path not in texts:
                os.link(path, target)
                continue
            text = texts[path]
            for old, new in others.items():
                text = text.replace(old, new)
            target.write_text(text, encoding="utf-8")
        count += len(paths)
    return count


def _fill_registry(database: Path, keys: list[str], versions: int) -> None:
    """Put versions beside the one that is there until there are so many, each with a run and a logged model."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        rows = {table: [dict(row) for row in connection.execute(f"SELECT * FROM {table}")] for table in CLONED}  # noqa: S608 - MLflow's own names
        run, model = rows["runs"][0]["run_uuid"], rows["logged_models"][0]["model_id"]
        for table, of_table in rows.items():
            marks = ", ".join("?" * len(of_table[0]))
            insert = f"INSERT INTO {table} ({', '.join(of_table[0])}) VALUES ({marks})"  # noqa: S608 - MLflow's own names
            for number in range(2, versions + 1):
                others = {key: _other(key, number) for key in keys}
                others |= {run: _other(run, number), model: "m-" + _other(model[2:], number)}

                def cloned(column: str, value: Any, number: int = number, others: dict[str, str] = others) -> Any:
                    if column == "version":
                        return number
                    return value.replace(model, others[model]) if column == "source" else others.get(value, value)

                connection.executemany(insert, [[cloned(*field) for field in row.items()] for row in of_table])
    connection.close()
