"""A schedule small enough for tests: text that grows in slices, ticks of seconds, and a store that can be put back."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.run import Config
from pipeline.flow.plan import RunPlan
from pipeline.retrain.decisions import Decision, Decisions
from pipeline.retrain.gate import Evidence
from pipeline.retrain.tick import Verdict, run_tick
from pipeline.tracking import runs
from pipeline.tracking.listener import Listener
from tests.conftest import Recorder

NAME, DATABASE = "tiny", "mlflow.db"
BETTER = {"finetune.steps": 40, "distill.steps": 30}  # than the first recipe
SPOILT = {"distill.lr": 1e-9}  # a student that stays as it starts


@dataclass
class Schedule:
    """A folder with text, store and registry. `evidence` is what the gate is given beside scores."""

    folder: Path
    make: Callable[..., Config]
    documents: list[str]
    listeners: list[Recorder] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    heard: list[Decision] = field(default_factory=list)  # by whoever is notified of decisions
    deaf: bool = False  # so that nothing arrives there
    splits: dict[str, str] = field(default_factory=dict)  # that are given, by the name of their setting
    sections: dict[str, Any] = field(default_factory=dict)  # of the configuration, beside those of the tests

    def grow(self, slices: int, size: int = 130) -> None:
        """Have the first so many slices of the text."""
        for number in range(slices):
            self.write(f"text/{number}.jsonl", self.documents[number * size : (number + 1) * size])

    def write(self, name: str, documents: Sequence[str]) -> str:
        """Write a file of documents; return its path."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return str(path)

    def config(self, recipe: dict[str, Any] | None = None, **retrain: Any) -> Config:
        data = {"source": str(self.folder / "text" / "*.jsonl"), "holdout": 0.1, **self.splits}
        return self.make(self.folder, data=data, retrain={"recipes": [recipe or {}], **retrain}, **self.sections)

    @contextlib.contextmanager
    def told(self, plan: RunPlan) -> Iterator[Listener]:
        self.listeners.append(Recorder())
        yield self.listeners[-1]

    def tick(self, recipe: dict[str, Any] | None = None, force: bool = False, **retrain: Any) -> Verdict:
        """Run one tick; `trained` then says which stages ran."""
        self.listeners.clear()
        return run_tick(self.config(recipe, **retrain), self.told, lambda *asked: self.evidence, force, self.notified)

    def notified(self, decision: Decision) -> bool:
        if not self.deaf:
            self.heard.append(decision)
        return not self.deaf

    @property
    def trained(self) -> set[str]:
        return {stage for listener in self.listeners for status, stage in listener.events if status == "done"}

    @property
    def decisions(self) -> list[Decision]:
        """All decisions, the last one first."""
        return [*Decisions.of(NAME, self.config().resources).all()]

    @property
    def aliases(self) -> dict[str, int]:
        """Where the registry has the aliases."""
        model = runs.client_of(self.uri).get_registered_model(NAME)
        return {alias: int(version) for alias, version in model.aliases.items()}

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'store' / DATABASE}"

    def keep(self, name: str) -> None:
        """Keep text, store and registry as they are, to be put back."""
        kept = self.folder / name
        kept.mkdir()
        for name in ("store", "text"):
            shutil.copytree(self.folder / name, kept / name)

    def put_back(self, name: str) -> None:
        """Put all back to where `keep` found it, at the same paths; the database in place, for MLflow has it open."""
        kept, store = self.folder / name, self.folder / "store"
        shutil.rmtree(self.folder / "text")
        shutil.copytree(kept / "text", self.folder / "text")
        for path in store.iterdir():
            if path.name != DATABASE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(kept / "store", store, dirs_exist_ok=True, ignore=lambda folder, names: {DATABASE} & {*names})
        with (
            contextlib.closing(sqlite3.connect(kept / "store" / DATABASE)) as before,
            contextlib.closing(sqlite3.connect(store / DATABASE)) as now,
        ):
            before.backup(now)
