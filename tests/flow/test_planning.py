"""What planning asks of the store: the record of each step, and listings only where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run import Config
from pipeline.flow.plan import RunPlan, plan_run, reasons
from pipeline.store.objects import Directory
from pipeline.store.records import TeacherCache
from tests.conftest import Ran


@dataclass
class Asked:
    """Names that were read and prefixes that were listed, in order."""

    read: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What directories are asked from here on."""
    found, read, sizes = Asked(), Directory.read, Directory.sizes

    def reading(self: Directory, name: str) -> bytes:
        found.read.append(name)
        return read(self, name)

    def listing(self: Directory, prefix: str) -> dict[str, int]:
        found.listed.append(prefix)
        return sizes(self, prefix)

    monkeypatch.setattr(Directory, "read", reading)
    monkeypatch.setattr(Directory, "sizes", listing)
    return found


def record_names(plan: RunPlan) -> list[str]:
    return [f"{step.name}/{step.key}/record.json" for step in plan.steps]


def test_a_plan_of_what_is_done_reads_one_record_a_step_and_lists_nothing(finished: Ran, asked: Asked) -> None:
    plan = plan_run(finished.plan.config)
    assert plan.left == []
    assert asked.read == record_names(plan)
    assert set(reasons(plan).values()) == {"done before"}
    assert asked == Asked(read=record_names(plan))


def test_only_reasons_look_at_what_was_run_before(
    finished: Ran, tiny_config: Callable[..., Config], tmp_path: Path, asked: Asked
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, quant={"bits": "4-4-8"}, resources=store))
    assert [step.name for step in plan.left] == ["distill", "evaluate", "pack", "register"]
    assert asked == Asked(read=record_names(plan))
    assert reasons(plan)["distill"] == 'quant.bits: "2-2-8" -> "4-4-8"'
    assert asked.listed == ["distill/"]  # the others follow a step that is not done


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"cache": {"dtype": "float32"}}, "cache"),
        ({"cache": {"dtype": "float32"}, "distill": {"seed": 1}}, "cache"),
        ({"finetune": {"seed": 1}}, "finetune"),
    ],
    ids=str,
)
def test_of_a_cache_to_be_made_the_store_is_asked_for_attempts_alone(
    finished: Ran,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    asked: Asked,
    fields: dict[str, Any],
    left: str,
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, resources=store, **fields))
    cache = f"cache/{plan.step(TeacherCache).key}/"
    assert plan.left[0].name == left
    assert asked == Asked(read=[*record_names(plan), f"{cache}lease.json"])  # no attempt made any of it
    reasons(plan)
    assert asked.listed == [f"{left}/"]


def test_deciding_the_mode_of_the_cache_asks_the_store_for_nothing(
    finished: Ran, tiny_config: Callable[..., Config], tmp_path: Path, asked: Asked
) -> None:
    store = finished.plan.config.resources.model_dump()
    plan = plan_run(tiny_config(tmp_path, cache={"mode": "auto"}, resources=store))
    assert plan.cache_mode[0] == "online"  # each row is read less than twice
    assert asked == Asked(read=record_names(plan))
