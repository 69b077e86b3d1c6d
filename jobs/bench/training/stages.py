"""What stages cost on the CPU beside the least that could do their work: tokenize, evaluate and pack.

Each is given one thread, as a worker has, and seconds are of the CPU, so that what else a machine does changes little.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jobs.bench.scale.worker import tokenizing_step
from jobs.bench.training.measures import Take
from jobs.bench.training.steps import BITS, Shape
from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.models.build import build, fp32_bytes, read_config
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, load_frozen, make_student, restore_frozen, save_frozen
from pipeline.package.package import read_package, write_package
from pipeline.quant.frozen import FrozenTensors
from pipeline.stages.tokenize import TokenizePart, documents_of, make_tokenizer
from pipeline.store.records import Tokens
from pipeline.tasks.language_modeling import score
from pipeline.tasks.tokenizers import encoded, read_tokenizer

MIB = 4.0  # of text that is tokenized
BATCHES = 2  # that are scored
PARALLEL = "TOKENIZERS_PARALLELISM"
FAMILY = family_named("gpt2")
NOTHING: dict[str, Any] = {"teacher": {}, "student": {}}
FACTS = {"name": "random", "lineage": {}, "metrics": {**NOTHING, "validation": NOTHING, "protocol": "none"}}


def tokenizing(shape: Shape, rounds: int) -> dict[str, float]:
    """Time a worker of tokenize on JSON lines, and the tokenizer alone on the same documents; return milliseconds, and
    the stage's speed over the tokenizer's."""
    with tempfile.TemporaryDirectory() as folder, tokenizing_step(Path(folder), MIB) as (job, part):
        tokenizer = make_tokenizer(job, ())
        worker, words = TokenizePart(job, tokenizer, {}), read_tokenizer(job.dir.folder(tokenizer, Tokens.FOLDER))
        texts = list(documents_of(part, job.recipe))

        def stage(step: int) -> None:
            worker(part.model_copy(update={"index": step}))  # as another part, for one that is there is not made again

        return _compared("stage", stage, "encode_batch", lambda step: encoded(words, texts), rounds)


def evaluating(shape: Shape, rounds: int) -> dict[str, float]:
    """Time the scores of a frozen student and its teacher over rows, and their plain forward passes; return
    milliseconds, and the speed of scoring over that of the passes."""
    teacher, quant, frozen = _random(shape)
    models = restore_frozen(teacher.config, quant.spec(), FAMILY, frozen), teacher.eval()
    torch.manual_seed(0)
    rows = [torch.randint(shape.vocab, (shape.batch, shape.length)) for _ in range(BATCHES)]
    lengths, bytes_of = torch.full((shape.batch,), shape.length), torch.ones(shape.vocab, dtype=torch.int64)

    @torch.inference_mode()
    def forward(step: int) -> None:
        for ids in rows:
            for model in models:
                model(input_ids=ids, use_cache=False)

    def scored(step: int) -> None:
        score([(ids, lengths) for ids in rows], models[0], bytes_of, models[1])

    return _compared("stage", scored, "forward", forward, rounds)


def packing(shape: Shape, rounds: int) -> dict[str, float]:
    """Time what pack does of a frozen student of GPT-2 small, and a copy of its fp32 teacher by safetensors; return
    milliseconds, and the speed of packing over that of the copy."""
    teacher, quant, frozen = _random(shape)
    facts = FACTS | {"teacher_bytes": fp32_bytes(teacher)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_frozen(frozen, folder / "frozen")
        save_file({name: t.detach().clone() for name, t in teacher.named_parameters()}, folder / "fp32")
        (folder / "package").mkdir()

        def pack(step: int) -> None:
            loaded = load_frozen(folder / "frozen")
            write_package(folder / "package", loaded, teacher.config, quant, "dense", FAMILY.name, facts)
            read_package(folder / "package")

        def copy(step: int) -> None:
            save_file(load_file(folder / "fp32"), folder / "copy")

        return _compared("stage", pack, "copy", copy, rounds)


def _random(shape: Shape) -> tuple[Any, Quant, FrozenTensors]:
    """Return a model of a shape with random weights, and its student by the preset `best`, frozen as it starts."""
    quant = Quant.model_validate({**PRESETS["best"]["quant"], "bits": BITS})
    teacher, student = (build(read_config(shape.source()), seed=0) for _ in range(2))
    make_student(student, quant.spec(), FAMILY)
    return teacher, quant, freeze_student(student, quant, FAMILY)


def _compared(name: str, stage: Take, least: str, work: Take, rounds: int) -> dict[str, float]:
    """Take both in turn; return the median milliseconds of each, and the first's speed over the second's."""
    times: dict[str, list[float]] = {name: [], least: []}
    with _one_thread():
        for step in range(rounds + 1):
            for which, take in ((name, stage), (least, work)):
                begun = time.process_time()
                take(step)
                times[which].append(time.process_time() - begun)
    medians = {which: median(seconds[1:]) for which, seconds in times.items()}  # the first warms up
    in_ms = {f"{which}_ms": 1e3 * seconds for which, seconds in medians.items()}
    return in_ms | {"speed": medians[least] / medians[name]}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute and tokenize with one thread while inside."""
    threads, parallel = torch.get_num_threads(), os.environ.get(PARALLEL)
    torch.set_num_threads(1)
    os.environ[PARALLEL] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop(PARALLEL)
        os.environ.update({} if parallel is None else {PARALLEL: parallel})
