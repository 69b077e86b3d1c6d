"""A command that is interrupted, or killed at random moments, goes on where it was, and ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.bench.chaos.processes import start

DEADLINE_S = 900  # bounds what hangs; a busy machine may take its time
pytestmark = pytest.mark.timeout(2 * DEADLINE_S)
STEPS = 150
WORDS = ["the", "a", "red", "blue", "old", "cat", "dog", "bird", "sees", "likes", "finds", "and", "near", "today"]


def corpus(path: Path) -> None:
    words = random.Random(0)
    sentences = (" ".join(words.choices(WORDS, k=words.randint(4, 16))) + ".\n\n" for _ in range(28_000))
    path.write_text("".join(sentences))


class Project:
    """A configuration, its store, and the processes that its commands started."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.store = root, root / "store"
        self.started: dict[int, float] = {}
        self.config = root / "config.yaml"
        architecture = {"architecture": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}
        config = {
            "name": "killed",
            "model": {"source": architecture, "tokenizer": {"train_bpe": 280}},
            "task": {"block_length": 32},
            "data": {"source": str(text)},
            "finetune": {"steps": STEPS, "batch_size": 16, "lr": 3e-3, "eval_every": 30, "eval_rows": 32},
            "cache": {"mode": "states"},
            "distill": {"steps": STEPS, "batch_size": 16, "lr": 1e-3, "eval_every": 30, "eval_rows": 32},
            "resources": {
                "workers": 2,
                "storage_uri": str(self.store),
                "checkpoint_minutes": 0.001,
                "micro_batch": 4,
                "inference_batch": 4,  # so that a cache takes long enough to be met half made
            },
        }
        self.config.write_text(yaml.safe_dump(config))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cli", "compress", str(self.config), "--json"]
        with open(self.root / "stdout", "w") as stdout, open(self.root / "stderr", "a") as stderr:
            return start(command, stdout=stdout, stderr=stderr, text=True)

    def finish(self, driver: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait for the command; its JSON document."""
        self.until(lambda: driver.poll() is not None, driver)
        assert driver.returncode == 0, (self.root / "stderr").read_text()[-3000:]
        document: dict[str, Any] = json.loads((self.root / "stdout").read_text())
        return document

    def until(self, happened: Callable[[], Any], driver: subprocess.Popen[str]) -> Any:
        """Poll until something has happened, which the driver must live to see; notes the processes it starts."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(driver.pid).children(recursive=True):
                    self.started[process.pid] = process.create_time()
            ended = driver.poll() is not None
            if value := happened():
                return value
            assert not ended, (self.root / "stderr").read_text()[-3000:]
            time.sleep(0.05)
        raise TimeoutError((self.root / "stderr").read_text()[-3000:])

    def worker(self, name: str) -> psutil.Process | None:
        """A running Ray worker of this project whose title starts with `name`."""
        for pid, created in self.started.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created and "".join(process.cmdline()).startswith(name):
                    return process
        return None

    def alive(self) -> list[str]:
        """What the project's commands started and what still runs."""
        named = []
        for pid, created in self.started.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    named.append(" ".join(process.cmdline())[:200])
        return named

    def exists(self, pattern: str) -> Callable[[], bool]:
        return lambda: any(self.store.glob(pattern))

    def newest(self, stage: str) -> int:
        """The step of the last checkpoint of a stage's attempt; 0 if there is none."""
        names = (path.stem for path in self.store.glob(f"{stage}/*/*/attempt/checkpoint-*.json"))
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    def checkpoints(self) -> set[Path]:
        """The checkpoints that are there."""
        return set(self.store.glob("*/*/*/attempt/checkpoint-*.json"))

    def reap(self) -> None:
        """End what killed drivers left behind, by recorded pid."""
        for pid, created in self.started.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    process.kill()

    def digests(self) -> dict[str, str]:
        """Content of every weight and row that a run hands on, whichever attempt made it."""
        found = {}
        for path in self.store.glob("*/*/record.json"):
            record = json.loads(path.read_text())
            splits = record.get("splits", {}).values()
            shards = [*record.get("shards", ()), *(shard for split in splits for shard in split["shards"])]
            files = record["files"] | {shard["name"]: shard["file"] for shard in shards}
            for name in files:
                if name.endswith((".safetensors", ".parquet", ".arrow")):
                    content = (path.parent / str(files[name]["fence"]) / name).read_bytes()
                    found[f"{path.parent.relative_to(self.store)}/{name}"] = hashlib.sha256(content).hexdigest()
        return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    corpus(path)
    return path


@pytest.fixture
def project(tmp_path: Path, text: Path) -> Iterator[Project]:
    made = Project(tmp_path, text)
    yield made
    made.reap()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[tuple[dict[str, str], Any]]:
    project = Project(tmp_path_factory.mktemp("undisturbed"), text)
    document = project.finish(project.start())
    yield project.digests(), document
    project.reap()


def ended(driver: subprocess.Popen[str]) -> bool:
    return driver.poll() is not None


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def test_an_interrupted_command_ends_what_it_started(project: Project) -> None:
    """By the driver's own doing: nobody else hears the signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before = project.newest("finetune")
        driver = project.start()
        project.until(lambda before=before: project.newest("finetune") > before, driver)
        driver.send_signal(number)
        assert driver.wait(DEADLINE_S) == 1, (project.root / "stderr").read_text()[-3000:]
        end = time.monotonic() + DEADLINE_S
        while project.alive() and time.monotonic() < end:
            time.sleep(0.1)
        assert project.alive() == []
        said = (project.root / "stderr").read_text()
        assert said.rstrip().endswith(
            "interrupted; what was committed is kept, and the same command goes on from there"
        )
        (lease,) = project.store.glob("finetune/*/lease.json")
        assert json.loads(lease.read_text())["owner"] is None
        (project.root / "stderr").unlink()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_driver_killed_at_random_moments(project: Project, undisturbed: tuple[dict[str, str], Any], seed: int) -> None:
    """Each some time after it made a checkpoint that those before it did not."""
    moments, killed = random.Random(seed), 0
    for _ in range(3):
        before, driver = project.checkpoints(), project.start()
        project.until(lambda before=before, driver=driver: project.checkpoints() - before or ended(driver), driver)
        end = time.monotonic() + moments.uniform(0, 30)
        project.until(lambda end=end, driver=driver: time.monotonic() > end or ended(driver), driver)
        if not ended(driver):
            kill(driver)
            killed += 1
        driver.wait()
    assert killed >= 1
    document = project.finish(project.start())
    assert project.digests() == undisturbed[0]
    assert document["metrics"] == undisturbed[1]["metrics"]
