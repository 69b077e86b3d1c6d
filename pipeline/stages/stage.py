"""What a stage is given: its recipe, where its inputs lie, and the engine to run on."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.resources import Resources
from pipeline.execution.engine import Engine
from pipeline.store.records import Advance, Record
from pipeline.store.step_store import StepDir

R = TypeVar("R", bound=Record)
LIBRARIES = ("torch", "transformers", "ray", "pyarrow", "mlflow")


@dataclass(frozen=True)
class Done:
    """A finished step: its record and where its files lie."""

    record: Any
    place: StepDir


@dataclass(frozen=True)
class Step:
    """One step about to run. `locations` says where pinned sources lie; it never enters the key."""

    version: int
    recipe: dict[str, Any]
    inputs: dict[str, Done]
    place: StepDir
    engine: Engine
    advance: Advance
    locations: dict[str, Any] = field(default_factory=dict)

    @property
    def resources(self) -> Resources:
        return self.engine.resources

    def input(self, kind: type[R]) -> tuple[R, StepDir]:
        """The record of an earlier stage, and its place."""
        done = self.inputs[kind.stage]
        if not isinstance(done.record, kind):
            raise TypeError(f"the input {kind.stage} is a {type(done.record).__name__}")
        return done.record, done.place

    def identity(self) -> dict[str, Any]:
        """The fields that every record begins with."""
        return {
            "key": self.place.key,
            "stage_version": self.version,
            "recipe": self.recipe,
            "inputs": {name: done.record.key for name, done in self.inputs.items()},
            "provenance": provenance(),
        }


def provenance() -> dict[str, str]:
    """When and on what it ran, versions of the code and libraries; informative, never part of a key."""
    when = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine()}
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {**when, "bitmill": metadata.version("bitmill"), "commit": _commit(), **versions}


def _commit() -> str:
    """The checked-out commit if the code runs from a checkout."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return "unknown"
