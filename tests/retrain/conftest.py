"""One schedule whose first tick was run, for all tests: each begins where that one ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run import Config
from pipeline.retrain.decisions import Deciding
from pipeline.retrain.gate import Evidence
from pipeline.tracking import registry
from tests.retrain.schedule import BETTER, Schedule


@pytest.fixture(scope="session")
def begun(
    tiny_config: Callable[..., Config], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Schedule, dict[str, object]]:
    """A schedule after its first tick, and what that one gave."""
    documents = corpus.read_text(encoding="utf-8").strip().split("\n\n")
    schedule = Schedule(tmp_path_factory.mktemp("schedule"), tiny_config, documents)
    schedule.grow(1)
    first = schedule.tick()
    facts = {"verdict": first, "trained": schedule.trained, "aliases": schedule.aliases}
    schedule.keep("begun")
    return schedule, facts


@pytest.fixture(scope="session")
def scored(begun: tuple[Schedule, dict[str, object]]) -> str:
    """The name of a state in which a better challenger was trained and scored, and not registered."""
    schedule, _ = begun
    schedule.grow(2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "register_package", interrupted)
        with pytest.raises(InterruptedError):
            schedule.tick(BETTER)
    schedule.keep("scored")
    schedule.put_back("begun")
    return "scored"


@pytest.fixture(scope="session")
def challenged(begun: tuple[Schedule, dict[str, object]], scored: str) -> str:
    """The name of a state in which that challenger met the champion, and nothing was decided."""
    schedule, _ = begun
    schedule.put_back(scored)
    with pytest.MonkeyPatch.context() as patched, contextlib.suppress(InterruptedError):
        patched.setattr(Deciding, "append", interrupted)
        schedule.tick(BETTER)
    schedule.keep("challenged")
    schedule.put_back("begun")
    return "challenged"


def interrupted(*given: Any) -> None:
    raise InterruptedError


@pytest.fixture
def undecided(schedule: Schedule, challenged: str) -> Schedule:
    """The schedule in that state."""
    schedule.put_back(challenged)
    return schedule


@pytest.fixture
def schedule(begun: tuple[Schedule, dict[str, object]]) -> Iterator[Schedule]:
    """The schedule as the first tick left it."""
    schedule, _ = begun
    schedule.heard.clear()
    yield schedule
    schedule.evidence, schedule.splits, schedule.deaf = Evidence(), {}, False
    schedule.put_back("begun")
