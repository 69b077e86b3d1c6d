"""What all tests share: one thread, no network, a tiny corpus, and runs that take seconds."""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the default tries a server that is away for minutes
os.environ.update(  # a busy machine may take its time
    RAY_gcs_server_port_wait_time_s="120", RAY_DASHBOARD_STARTUP_TIMEOUT_S="180", RAY_agent_register_timeout_ms="120000"
)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import settings

from pipeline.config.run import Config
from pipeline.flow.line import STAGES
from pipeline.flow.plan import RunPlan, plan_run
from pipeline.flow.run import Outcome, run_plan
from pipeline.store.lease import Owner
from pipeline.store.records import Point
from tests.second_device import Event, second_device

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
COLOURED = ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")  # by which a terminal is assumed where there is none
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
CACHES = {".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}
TEARDOWN_S = 900.0
SLOW = [ROOT / "tests" / name for name in ("cluster", "sweep", "flow", "jobs")]
ARCHITECTURES = {
    "gpt2": {"architecture": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32},
    "llama": {
        "architecture": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "bart": {
        "architecture": "bart",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
        "scale_embedding": True,
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first; of the slow ones, those that wait for processes begin, so that no worker ends alone."""
    items.sort(key=lambda item: next((n for n, name in enumerate(SLOW, 1) if item.path.is_relative_to(name)), 0))


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """What ends a test that hangs stops counting when it fails; its fixtures may hang as well."""
    stderr = node.config.stash[fault_handler_stderr_fd_key]  # the real one: what a test writes is captured
    faulthandler.dump_traceback_later(TEARDOWN_S, exit=True, file=stderr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """And the interpreter, which joins what still runs."""
    faulthandler.dump_traceback_later(TEARDOWN_S, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session", autouse=True)
def _tidy_session() -> Iterator[None]:
    """One thread for torch; a test that leaves something in the repository's root fails the session."""
    torch.set_num_threads(1)
    before = set(os.listdir(ROOT))
    yield
    left = {name for name in set(os.listdir(ROOT)) - before - CACHES if not name.endswith(".egg-info")}
    assert not left, f"the tests left {sorted(left)} in {ROOT}"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the shell's settings nor what MLflow put into the environment during the test before."""
    ours = ("BITMILL_STORAGE_URI", "BITMILL_SCALE_UP_MINUTES")
    for name in ("RAY_ADDRESS", *LOGIN, "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", *ours, *COLOURED):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["labelled", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device other than the CPU: one that every machine has, which only keeps tensors apart, and a GPU where there is
    one."""
    if request.param == "cuda":
        yield torch.device("cuda", 0)
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    autocast = torch.autocast  # whose numbers are the CPU's, as the device's are
    monkeypatch.setattr(torch, "autocast", lambda device_type, *args, **options: autocast("cpu", *args, **options))
    with second_device() as second:
        yield second


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 40 KB of paragraphs over 60 words, each of which has four likely successors."""
    draw = random.Random(7)
    words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2)) for _ in range(60)]
    after = {word: draw.choices(words, k=4) for word in words}

    def paragraph() -> str:
        word = draw.choice(words)
        sentence = [word := draw.choice(after[word]) for _ in range(draw.randint(8, 30))]
        return " ".join(sentence).capitalize() + "."

    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(paragraph() for _ in range(420)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_fields(corpus: Path) -> Callable[..., dict[str, Any]]:
    """The fields of a run of seconds in one process; overrides are laid over each section."""

    def make(folder: Path, **overrides: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": "tiny",
            "model": {"source": ARCHITECTURES["gpt2"], "tokenizer": {"train_bpe": 300}},
            "task": {"block_length": 32},
            "data": {"source": str(corpus)},
            "finetune": {"steps": 20, "batch_size": 8, "lr": 5e-3, "dropout": 0.0, "eval_every": 5},
            "cache": {"mode": "states"},
            "distill": {"steps": 12, "batch_size": 8, "lr": 2e-3, "eval_every": 5},
            "resources": {
                "workers": 0,
                "storage_uri": str(folder / "store"),
                "local_cache_dir": str(folder / "scratch"),
            },
        }
        for section, value in overrides.items():
            given = fields.get(section)
            fields[section] = {**given, **value} if isinstance(given, dict) and isinstance(value, dict) else value
        return fields

    return make


@pytest.fixture(scope="session")
def tiny_config(tiny_fields: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """`tiny_config(folder, quant={...}, ...)`: a run of seconds whose files stay under `folder`."""

    def make(folder: Path, **overrides: Any) -> Config:
        return Config.model_validate(tiny_fields(folder, **overrides))

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """As `tiny_config`, of the Llama family."""

    def make(folder: Path, **overrides: Any) -> Config:
        model = {"source": ARCHITECTURES["llama"], "tokenizer": {"train_bpe": 300}}
        return tiny_config(folder, model=model, **overrides)

    return make


@dataclass
class Recorder:
    """A listener that remembers what it was told."""

    events: list[tuple[str, str]] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    points: list[tuple[str, Point]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def named(self, stage: str, key: str) -> None:
        self.keys[stage] = key

    def started(self, stage: str) -> None:
        self.events.append(("started", stage))

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        self.progress[stage] = (done, total)

    def measured(self, stage: str, points: Sequence[Point]) -> None:
        self.points += [(stage, point) for point in points]

    def finished(self, stage: str, status: str, seconds: float) -> None:
        self.events.append((status, stage))

    def waiting(self, stage: str, owner: Owner) -> None:
        self.events.append(("waiting", stage))
        self.owners.append(owner)


@dataclass
class Ran:
    """A run: what was planned, what became of it, what the listener heard."""

    plan: RunPlan
    outcome: Outcome
    listener: Recorder

    def record(self, stage: str) -> Any:
        return self.outcome.steps[stage].record

    def folder(self, stage: str) -> Path:
        """Where the only attempt of a stage keeps its files."""
        return Path(self.plan.step(STAGES[stage].record).dir.uri) / "1"

    @property
    def package(self) -> Path:
        return self.folder("pack") / "package"


@pytest.fixture(scope="session")
def run_flow() -> Callable[..., Ran]:
    """`run_flow(config, until=...)`: plan and run, watched."""

    def run(config: Config, until: str = "register") -> Ran:
        plan, listener = plan_run(config, until), Recorder()
        return Ran(plan, run_plan(plan, listener), listener)

    return run


@pytest.fixture(scope="session")
def finished(
    tiny_config: Callable[..., Config], run_flow: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    """One finished run at 2-2-8. Tests read it and leave it as it is."""
    return run_flow(tiny_config(tmp_path_factory.mktemp("finished")))


@pytest.fixture(scope="session")
def checkpoint(finished: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of `finished` with its tokenizer, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for source in (finished.folder("finetune") / "model", finished.folder("tokenize") / "tokenizer"):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def cloned(finished: Ran, tmp_path: Path) -> Path:
    """`tmp_path` with a store that holds all of `finished` and an empty registry: `tiny_config(cloned)` reuses it."""
    shutil.copytree(finished.plan.config.resources.storage_uri, tmp_path / "store", ignore=_registry_files)
    return tmp_path


def _registry_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("mlflow")]
