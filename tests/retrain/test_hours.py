"""Worker-hours of a tick are counted over its attempts, whatever it is at; as many as it may end it, and more go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from pipeline.config.run import Config
from pipeline.errors import OverBudgetError
from pipeline.flow.plan import target_of
from pipeline.retrain import hours
from pipeline.retrain.decisions import Decisions
from pipeline.retrain.gate import Evidence
from pipeline.retrain.hours import WorkerHours
from pipeline.retrain.tick import Verdict, plan_tick, run_tick
from pipeline.store.lease import Owner
from pipeline.tracking import runs
from pipeline.tracking.listener import Listener
from tests.conftest import Recorder
from tests.retrain.schedule import BETTER, NAME, Schedule
from tests.retrain.test_promotion import KILLED, ended, in_a_process_of_its_own

HOUR = 3600.0


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(hours, "monotonic", clock)
    return clock


class Slow(Recorder):
    """A listener that has an hour go by at each sign of progress of one stage."""

    def __init__(self, clock: Clock, slow: str) -> None:
        super().__init__()
        self.clock, self.slow, self.notes = clock, slow, list[tuple[int, str]]()

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        super().advanced(stage, done, total, note)
        if stage == self.slow:
            self.clock.now_s += HOUR
            self.notes.append((done, note))


def capped(schedule: Schedule, most: float | None, workers: int = 0) -> Config:
    config = schedule.config(BETTER)
    given = {"max_worker_hours": most, "workers": workers, "checkpoint_minutes": 1e-9}
    return config.model_copy(update={"resources": config.resources.model_copy(update=given)})


@pytest.fixture
def slow(schedule: Schedule, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`slow(stage, most)`: run a tick of which a stage takes an hour a step; the verdict, and what was told."""

    def tick(
        stage: str, most: float | None, evidence: Any = lambda *asked: Evidence(), force: bool = False
    ) -> tuple[Verdict, list[Slow]]:
        told: list[Slow] = []

        def listener() -> Listener:
            told.append(Slow(clock, stage))
            return told[-1]

        monkeypatch.setattr("tests.retrain.schedule.Recorder", listener)
        return run_tick(capped(schedule, most), schedule.told, evidence, force), told

    return tick


def test_training_ends_when_as_much_is_used_as_may_be_and_goes_on_once_it_may(schedule: Schedule, slow: Any) -> None:
    schedule.grow(2)
    ((_, plan),) = plan_tick(capped(schedule, 7)).challengers
    begun = runs.find_run(target_of(plan, "tiny", None))  # as the command does, which has its curves there
    verdict, (told,) = slow("distill", 7)
    assert (verdict.outcome, verdict.champion) == ("rejected", 1)
    assert "at distill the tick had used 7 worker-hours, earlier attempts included, of the 7" in verdict.reason
    assert verdict.decision is not None
    assert (verdict.decision.challenger, verdict.decision.max_worker_hours) == (None, 7)
    assert verdict.decision.decided_by == "max_worker_hours"
    tags = runs.client_of(schedule.uri).get_run(begun.info.run_id).data.tags
    assert (tags["bitmill.decision"], tags["bitmill.decision_reason"]) == ("rejected", verdict.reason)
    assert verdict.decision.worker_seconds == 7 * HOUR
    assert [done for done, _ in told.notes] == [0, 0, 1, 2, 3, 4, 5]  # steps, of 30
    assert schedule.aliases == {"champion": 1}
    decisions = Decisions.of(NAME, schedule.config().resources)
    begun = {stage for stage, _ in decisions.notes().unfinished}
    assert begun >= {"distill", "register"}

    assert slow("distill", 7)[0].outcome == "unchanged"
    assert slow("distill", 2)[0].outcome == "unchanged"
    verdict, (told,) = slow("distill", 10)
    assert verdict.outcome == "rejected"
    assert told.notes[0] == (5, "resumed")
    assert [done for done, _ in told.notes] == [5, 6, 7]  # three hours more
    assert verdict.decision.worker_seconds == 10 * HOUR
    assert [d.max_worker_hours for d in schedule.decisions] == [10, 7, None]

    verdict, (told,) = slow("distill", 1, force=True)  # which counts from nothing
    assert ([done for done, _ in told.notes], verdict.decision.worker_seconds) == ([7], HOUR)

    verdict, (told, contest) = slow("distill", None)
    assert verdict.outcome == "promoted", verdict.reason
    assert told.notes[0] == (7, "resumed")
    assert verdict.decision.worker_seconds == (11 + len(told.notes)) * HOUR
    assert decisions.notes().unfinished == ()
    assert contest.events[-1] == ("done", "contest")
    assert slow("distill", 7)[0].outcome == "unchanged"


def test_contest_and_measurements_count_too(undecided: Schedule, slow: Any, clock: Clock) -> None:
    def takes_hours(*asked: Any) -> Evidence:
        clock.now_s += 2 * HOUR
        return Evidence()

    shutil.rmtree(undecided.folder / "store" / "retrain" / NAME / "hours")  # those of real time
    for record in (undecided.folder / "store" / "contest").glob("*/record.json"):
        record.unlink()
    verdict, _ = slow("contest", 0.5)
    assert verdict.outcome == "rejected"
    assert verdict.reason.startswith("at contest the tick had used 1 worker-hours")
    assert verdict.decision is not None
    assert (verdict.decision.challenger, verdict.decision.champion) == (2, 1)
    verdict, (_, contest) = slow("contest", None, takes_hours)
    assert verdict.outcome == "promoted"
    assert verdict.decision is not None
    assert verdict.decision.worker_seconds == (1 + len(contest.notes) + 2) * HOUR


def test_hours_of_all_attempts_count_and_those_of_waiting_do_not(schedule: Schedule, clock: Clock) -> None:
    def attempt(fence: int, most: float = 100.0) -> WorkerHours:
        return WorkerHours(NAME, "key", fence, capped(schedule, most, workers=4).resources)

    first = attempt(1)
    with first.watched(nullcontext)(Recorder()) as listener:  # type: ignore[arg-type]
        listener.started("distill")
        clock.now_s += HOUR
        listener.waiting("distill", Owner.this_process())
        clock.now_s += 5 * HOUR
        listener.advanced("distill", 0, 1, "")
        clock.now_s += HOUR
        listener.finished("distill", "done", 7 * HOUR)
        clock.now_s += HOUR
    second = attempt(2)
    assert first.spent_s == 8 * HOUR
    assert WorkerHours(NAME, "key", 3, capped(schedule, 1).resources, again=True).spent_s == 0  # of a decision anew
    with suppress(ZeroDivisionError), second.counted("it"):
        clock.now_s += HOUR
        raise ZeroDivisionError
    assert second.spent_s == attempt(3).spent_s == 12 * HOUR
    with pytest.raises(OverBudgetError, match="at it the tick had used 12 worker-hours"), attempt(3, 12).counted("it"):
        raise AssertionError("it was not to begin")


def test_what_a_killed_attempt_used_counts_for_the_next(schedule: Schedule, clock: Clock) -> None:
    resources = capped(schedule, 100).resources

    def killed() -> None:
        told = WorkerHours(NAME, "key", 1, resources).watched(nullcontext)  # type: ignore[arg-type]
        with told(Recorder()) as listener:  # type: ignore[arg-type]
            listener.started("distill")
            clock.now_s += HOUR
            listener.advanced("distill", 0, 1, "")
            os._exit(KILLED)

    assert ended(in_a_process_of_its_own(killed)) == KILLED
    assert WorkerHours(NAME, "key", 2, resources).spent_s == HOUR
