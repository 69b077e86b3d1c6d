"""`bitmill bench chaos`: a model is compressed on nodes that die, with a store in an S3 that fails, and comes out as it
does where nothing happens."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from jobs.bench.chaos.cluster import Cluster, variables
from jobs.bench.chaos.command import Command
from jobs.bench.chaos.proxy import FaultProxy
from jobs.bench.chaos.server import CLEARED, SETTINGS, make_bucket, served
from jobs.bench.chaos.storm import Storm
from jobs.display import print_table
from pipeline.config.resources import Resources
from pipeline.errors import RunError
from pipeline.provenance import provenance
from pipeline.retrain.gc import Collector
from pipeline.store.objects import open_objects
from pipeline.store.records import Package
from pipeline.store.step_store import RECORD

BUCKET, STORM, CALM = "chaos", "storm", "calm"
NODES, WORKERS = 3, 2
CHECKPOINT_S = 3.0
STEPS = {"finetune": 150, "distill": 200}
PARAGRAPHS, WORDS = 12_000, ("the", "a", "red", "blue", "old", "cat", "dog", "bird", "sees", "likes", "finds", "and")
HUNG_S = 1200.0  # without an end, and nothing that strikes


def measure(faults: int, seed: int, out: Path, console: Console) -> dict[str, Any]:
    """Compress under so many strikes, and undisturbed; print what came of it, write chaos.json and return it. Where a
    model is done before that many, another seed of it follows. Logs of the commands lie beside chaos.json.

    Raises:
        RunError: a command hung or was refused; or a package is another than undisturbed, what a checkpoint held was
            trained again, or something is left in the store that gc does not find.
    """
    out.mkdir(parents=True, exist_ok=True)
    proxy = FaultProxy(seed)
    with tempfile.TemporaryDirectory() as place, served() as port, proxy.before(port) as before:
        make_bucket(port, BUCKET)
        endpoint = SETTINGS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{before}"}
        with variables(endpoint, CLEARED), Cluster(NODES) as cluster:
            document = _compared(Path(place), out.resolve(), cluster, proxy, faults, seed, console)
    (out / "chaos.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print(document, console)
    if flaws := _flaws(document):
        raise RunError("\n".join(flaws))
    return document


def _compared(
    folder: Path, out: Path, cluster: Cluster, proxy: FaultProxy, faults: int, seed: int, console: Console
) -> dict[str, Any]:
    """Return the document: runs in a storm and the same runs after it."""
    _write_corpus(folder / "text.txt")
    runs: list[dict[str, Any]] = []
    storm = Storm(cluster, proxy, open_objects(_resources(folder, STORM).storage_uri), faults, seed)
    while not storm.over:
        if len(runs) > faults:
            raise RunError(
                f"No {' and no '.join(storm.missing)} in {len(runs)} runs: stages end before they can be struck."
            )
        command, begun = _command(folder, out, STORM, len(runs), cluster), time.monotonic()
        _see_through(command, storm, faults, console)
        runs.append(_run(folder, STORM, command) | {"seconds": round(time.monotonic() - begun, 1)})
    for number, run in enumerate(runs):
        console.print(f"seed {number} once more, and nothing strikes")
        command = _command(folder, out, CALM, number, cluster)
        _see_through(command, storm, 0, console)
        run["undisturbed"] = _run(folder, CALM, command)
    left = {name: _left_by_gc(_resources(folder, name)) for name in (STORM, CALM)}
    return {
        "provenance": provenance(),
        "nodes": NODES,
        "workers": WORKERS,
        "strikes": dict(sorted(storm.strikes.items())),
        "stages": [{"strike": kind, "stage": stage} for kind, stage in storm.stages],
        "failed_requests": dict(sorted(storm.requests.items())),
        "runs": runs,
        "left": sorted(((left[STORM] - left[CALM]) + (left[CALM] - left[STORM])).elements()),
    }


def _see_through(command: Command, storm: Storm, faults: int, console: Console) -> None:
    """Give a command until it is done, and strike meanwhile, until there were so many strikes."""
    command.give()
    try:
        end = time.monotonic() + HUNG_S
        while command.status != 0 and command.given <= faults + 1 and time.monotonic() < end:
            if command.status is not None:
                command.give()
            if storm.over:
                time.sleep(0.2)
            elif (kind := storm.strike(command)) is not None:
                console.print(f"{storm.strikes.total()} of {faults}: {kind}")
                end = time.monotonic() + HUNG_S
            command.follow()
        if command.status != 0:
            raise RunError(f"A command was not done, given {command.given} times: {command.said}")
    finally:
        command.end()
    command.follow()


def _command(folder: Path, out: Path, store: str, number: int, cluster: Cluster) -> Command:
    """Return the compression of a seed into one of the two stores."""
    place = out / f"{store}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    training = {"batch_size": 16, "eval_every": 50, "eval_rows": 32}
    fields = {
        "name": "chaos",
        "model": {
            "source": {"architecture": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
            "tokenizer": {"train_bpe": 300},
        },
        "task": {"block_length": 64},
        "data": {"source": str(folder / "text.txt")},
        "finetune": {"steps": STEPS["finetune"], "lr": 3e-3, "seed": number, **training},
        "cache": {"mode": "states"},
        "distill": {"steps": STEPS["distill"], "lr": 1e-3, "seed": number, **training},
        "resources": _resources(folder, store).model_dump(mode="json", exclude_unset=True),
    }
    (place / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    return Command(place / "config.yaml", os.environ | cluster.variables)


def _resources(folder: Path, store: str) -> Resources:
    return Resources(
        workers=WORKERS,
        storage_uri=f"s3://{BUCKET}/{store}",
        tracking_uri=f"sqlite:///{folder / store}.db",
        local_cache_dir=str(folder / "copies" / store),
        checkpoint_minutes=CHECKPOINT_S / 60,
        micro_batch=4,
        inference_batch=4,  # a cache takes long enough to be met half made
    )


def _write_corpus(path: Path) -> None:
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=draw.randint(4, 16))) + ".\n\n" for _ in range(PARAGRAPHS))
    path.write_text("".join(lines), encoding="utf-8")


def _run(folder: Path, store: str, command: Command) -> dict[str, Any]:
    """Return what became of a run: the digest of its package, and what was trained again."""
    (pack,) = (stage for stage in command.document["stages"] if stage["stage"] == Package.stage)
    record = json.loads(open_objects(_resources(folder, store).storage_uri).read(f"pack/{pack['key']}/{RECORD}"))
    return {
        "digest": record["digest"],
        "commands": command.given,
        "again": [resumed._asdict() for resumed in command.progress.again],
    }


def _left_by_gc(resources: Resources) -> Counter[str]:
    """Return what is in a store after a collection, how often, whichever attempts at a step it is of."""
    collector = Collector(resources, 1, 0.0)
    collector.delete(collector.find())
    names = open_objects(resources.storage_uri).sizes("")
    return Counter(re.sub(r"^([^/]+/[^/]+)/\d+/", r"\1/", name) for name in names)


def _flaws(document: dict[str, Any]) -> list[str]:
    """Return what must not be, each as a sentence."""
    flaws = [
        f"The package of seed {number} is {run['digest']}, and undisturbed {run['undisturbed']['digest']}."
        for number, run in enumerate(document["runs"])
        if run["digest"] != run["undisturbed"]["digest"]
    ]
    flaws += [
        f"{again['stage']} went on from step {again['resumed']}, and a checkpoint had step {again['checkpoint']}."
        for run in document["runs"]
        for again in run["again"]
        if again["resumed"] < again["checkpoint"]
    ]
    if document["left"]:
        flaws.append(f"After gc the stores differ by {', '.join(document['left'])}.")
    return flaws


def _print(document: dict[str, Any], console: Console) -> None:
    failed = document["failed_requests"]
    strikes = document["strikes"].items()
    rows = [(kind, str(times), f"{failed[kind]:,}" if kind in failed else "") for kind, times in strikes]
    print_table(console, ("strike", "times", "requests that failed"), rows)
    for number, run in enumerate(document["runs"]):
        same = "as undisturbed" if run["digest"] == run["undisturbed"]["digest"] else "another than undisturbed"
        console.print(f"seed {number}: given {run['commands']} times, {run['seconds']} s; its package is {same}")
        for again in run["again"]:
            console.print(f"  {again['stage']} had reached step {again['reached']}, went on from {again['resumed']}")
