"""How long a packed model takes for a token, on the machine that is asked, kept beside its package."""

from __future__ import annotations

import platform
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field, ValidationError
from rich.console import Console

from jobs.display import Display
from pipeline.config.base import Closed
from pipeline.errors import RunError
from pipeline.models.build import read_config
from pipeline.store.objects import open_objects
from pipeline.store.records import Package
from pipeline.store.step_store import FinishedStep

FILE = "latency.json"
PROMPT, NEW, ROUNDS, THREADS = 32, 64, 5, 1
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Latency(Closed):
    """Milliseconds of a new token at batch 1 with the packed runtime; the spread is over rounds."""

    median_ms: Milliseconds
    least_ms: Milliseconds
    most_ms: Milliseconds
    rounds: int
    threads: int
    machine: str


def measure(packages: Sequence[tuple[str, FinishedStep[Package]]], console: Console) -> None:
    """Decode with each package in turns, each with its label; what the runtime does not run is said and left out."""
    from jobs.bench.inference import run_engine  # transformers, which a report need not import

    milliseconds: dict[int, list[float]] = {index: [] for index in range(len(packages))}
    with ExitStack() as stack:
        folders = [stack.enter_context(_fetched(package)) for _, package in packages]
        display = stack.enter_context(Display(console))
        advance = stack.enter_context(display.stage("latency"))
        for number in range(ROUNDS):
            for index in list(milliseconds):
                try:
                    rates = run_engine("packed", folders[index], THREADS, *_lengths(folders[index]))
                except RunError as error:
                    console.print(f"{packages[index][0]}: no latency. {error}")
                    del milliseconds[index]
                else:
                    milliseconds[index].append(1000 / rates["decode_tokens_per_s"])
            advance(number + 1, ROUNDS)
    for index, values in milliseconds.items():
        took = {"median_ms": statistics.median(values), "least_ms": min(values), "most_ms": max(values)}
        latency = Latency(**took, rounds=ROUNDS, threads=THREADS, machine=platform.machine())
        open_objects(packages[index][1].dir.uri).write(FILE, latency.model_dump_json().encode())


@contextmanager
def _fetched(package: FinishedStep[Package]) -> Iterator[Path]:
    """Yield a folder that holds the package, each file checked."""
    with TemporaryDirectory(dir=package.dir.scratch_dir()) as name:
        shutil.copytree(package.folder(), Path(name) / Package.FOLDER)
        yield Path(name)


def _lengths(folder: Path) -> tuple[int, int]:
    """Count the tokens of the prompt and new ones, which must fit the model's positions."""
    positions = int(getattr(read_config(folder / Package.FOLDER), "max_position_embeddings", PROMPT + NEW))
    prompt = min(PROMPT, positions // 4)
    return prompt, min(NEW, positions - prompt)


def measured(package: FinishedStep[Package]) -> Latency | None:
    """Return what was measured last of a package, if anything was."""
    try:
        return Latency.model_validate_json(package.dir.read(FILE))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
