"""What one worker holds in memory while it tokenizes a single large .jsonl.gz, which it reads from beginning to end.

It is a process of its own that does what a worker of `tokenize` is told, and nothing else: what it imports counts.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.run import Config
from pipeline.provenance import provenance
from pipeline.sources.splits import SplitPart, split_parts
from pipeline.stages.stage import StepJob
from pipeline.stages.tokenize import TokenizedPart, TokenizePart, make_tokenizer
from pipeline.store.records import StoredFile, Tokens
from pipeline.tasks.tokenizers import save_tokenizer, train_bpe

MIB = 2**20
MOST_MB = 500.0  # of a worker, its libraries among it
FILE, TEXT = "scale-jsonl-gz.json", "text.jsonl.gz"
WORDS, ROW_WORDS = 20_000, 150
ROWS, FIRST = 30_000, 1_000  # that are not repeated, and that a tokenizer is learned from


def measure(mib: float, out: Path, run: Callable[..., Any]) -> dict[str, Any]:
    """Measure a worker, by `run`, on so many MiB of JSON lines, and write it; returns the document of `--json`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with tokenizing_step(Path(folder), mib) as (job, part):
            took = run(tokenized, job, make_tokenizer(job, ()), part)
        stored = (Path(folder) / TEXT).stat().st_size
    document = {"provenance": provenance(), "mib": mib, "stored_mib": stored / MIB, **took}
    (out / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


@contextlib.contextmanager
def tokenizing_step(folder: Path, mib: float) -> Iterator[tuple[StepJob, SplitPart]]:
    """Write JSON lines of so many MiB, compressed, into a folder; yield what a worker that tokenizes them is told, and
    the one part that it reads."""
    from pipeline.flow.plan import plan_run  # with MLflow, which no worker imports

    text = write_rows(folder / TEXT, int(mib * MIB))
    save_tokenizer(train_bpe(text, 4096), folder / "words")
    config = Config.model_validate(_fields(folder))
    step = plan_run(config, Tokens.stage).step(Tokens)
    with step.dir.hold(True, lambda owner: None) as held:
        part = next(p for p in split_parts(step.recipe, step.locations) if p.split == "train")
        yield StepJob(step.recipe, {}, held, config.resources, step.locations), part


def told(document: dict[str, Any]) -> str:
    """Return what was measured in a sentence."""
    text = f"a .jsonl.gz of {document['mib']:,.0f} MiB ({document['stored_mib']:,.0f} compressed)"
    idle = f"{document['idle_mb']:,.0f} of them before it begins"
    return (
        f"a worker that tokenizes {text} takes {document['peak_mb']:,.0f} MB at most, {idle}; {MOST_MB:g} are too many"
    )


def tokenized(job: StepJob, tokenizer: dict[str, StoredFile], part: SplitPart) -> dict[str, float]:
    """Tokenize a part as a worker does; return its rows, seconds of the CPU, and the most memory, before and in all."""
    import torch

    torch.set_num_threads(1)
    worker, idle, begun = TokenizePart(job, tokenizer, {}), peak_bytes() / 1e6, time.process_time()
    made = TokenizedPart.model_validate_json(worker(part))
    rows = sum(shard.rows for shard in made.shards)
    return {"rows": rows, "cpu_s": time.process_time() - begun, "idle_mb": idle, "peak_mb": peak_bytes() / 1e6}


def write_rows(path: Path, size: int) -> list[str]:
    """Write so many bytes of JSON lines, compressed, of words as frequent as those of a language; return the first few
    texts. Each row begins with its number; what follows comes again after some 30 MB."""
    draw = random.Random(0)
    words, weights = language(draw)
    cumulative = [*itertools.accumulate(weights)]
    texts, first, written = list[str](), list[str](), 0
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for number in itertools.count():
            if number < ROWS:
                texts.append(" ".join(draw.choices(words, cum_weights=cumulative, k=ROW_WORDS)))
            text = f"{number} {texts[number % ROWS]}"
            written += file.write(json.dumps({"text": text}) + "\n")
            first += [text] if number < FIRST else []
            if written >= size:
                break
    return first


def language(draw: random.Random) -> tuple[list[str], list[float]]:
    """Return words of a made-up language, the most frequent first, and how frequent each is (Zipf's law)."""
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]
    return words, [1 / rank for rank in range(1, WORDS + 1)]


def _fields(folder: Path) -> dict[str, Any]:
    """Return a run of that text, its files below a folder, of a model that nobody builds."""
    training = {"steps": 1, "batch_size": 4, "lr": 1e-3}
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 1, "n_positions": 512}
    return {
        "name": "scale",
        "model": {"source": {"architecture": "gpt2", **shape}, "tokenizer": str(folder / "words")},
        "data": {"source": str(folder / TEXT)},
        "finetune": training,
        "distill": training,
        "resources": {"storage_uri": str(folder / "store"), "local_cache_dir": str(folder / "scratch")},
    }


def peak_bytes() -> int:
    """Return the most that this process had resident, since it began or the kernel was told to count anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
