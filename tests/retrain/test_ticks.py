"""Every tick is in the history: those that decided nothing too."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.retrain import tick, ticks
from pipeline.retrain.decisions import Decisions
from pipeline.retrain.rollback import rollback
from pipeline.retrain.ticks import LONGEST, TickLog, Ticks, timeline
from tests.retrain.schedule import BETTER, NAME, Schedule
from tests.retrain.test_promotion import KILLED, ended, in_a_process_of_its_own


def log_of(schedule: Schedule) -> TickLog:
    return TickLog(Decisions.of(NAME, schedule.config().resources))


def told(schedule: Schedule) -> list[tuple[str, int]]:
    return [(line.outcome, line.count) for line in log_of(schedule).all()]


def take_away_text(schedule: Schedule) -> None:
    for path in (schedule.folder / "text").iterdir():
        path.unlink()


def test_ticks_in_a_row_are_one_line_and_a_decision_ends_it(undecided: Schedule) -> None:
    before = told(undecided)
    for _ in range(4):  # the first one decides
        undecided.tick(BETTER)
    (*_, line) = log_of(undecided).all()
    assert (line.outcome, line.count, line.since) == ("unchanged", 3, undecided.decisions[0].at)
    assert line.told().startswith(f"3 ticks, the last at {line.last}: nothing is new since")
    rollback(NAME, None, "it rhymes", undecided.config().resources)
    undecided.tick(BETTER)
    assert told(undecided) == [*before, ("unchanged", 3), ("unchanged", 1)]
    by_time = timeline(undecided.decisions[::-1], log_of(undecided).all()[len(before) :])
    assert [line.outcome if isinstance(line, Ticks) else line.decision for line in by_time] == [
        *("promoted", "promoted", "unchanged", "rolled back", "unchanged")
    ]


def test_a_busy_tick_is_written_down_by_itself(schedule: Schedule) -> None:
    with Decisions.of(NAME, schedule.config().resources).held():
        assert [schedule.tick().outcome for _ in range(2)] == ["busy", "busy"]
    (line,) = log_of(schedule).all()
    assert (line.outcome, line.count) == ("busy", 2)
    assert line.reason.startswith(f"The retraining of {NAME} is")


def test_a_tick_that_fails_leaves_its_error(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*given: Any) -> None:
        raise ConfigError("The text is away.\n" + "x" * LONGEST)

    with monkeypatch.context() as patched:
        patched.setattr(tick, "_decide", away)
        schedule.grow(2)
        with pytest.raises(ConfigError):
            schedule.tick(BETTER)  # once it held the name
    take_away_text(schedule)
    with pytest.raises(ConfigError, match="no file matches"):
        schedule.tick(BETTER)  # before
    (line,) = log_of(schedule).all()
    assert (line.outcome, line.count) == ("failed", 2)
    assert len(line.reason) <= LONGEST
    assert "\n" not in line.reason
    schedule.grow(1)
    schedule.tick()
    assert told(schedule) == [("failed", 2), ("unchanged", 1)]  # not as one that was killed


def test_a_tick_that_was_killed_is_written_down_by_the_next(schedule: Schedule) -> None:
    def child() -> None:
        tick._decide = lambda *given: os._exit(KILLED)
        schedule.grow(2)
        schedule.tick(BETTER)

    assert ended(in_a_process_of_its_own(child)) == KILLED
    assert told(schedule) == []
    (schedule.folder / "text" / "1.jsonl").unlink()
    schedule.tick()
    failed, unchanged = log_of(schedule).all()
    assert (failed.outcome, unchanged.outcome) == ("failed", "unchanged")
    assert "was killed, or its machine" in failed.reason


def test_a_tick_that_a_rollback_ended_was_not_killed(undecided: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    undecided.tick(BETTER)
    before = told(undecided)
    undecided.grow(3)

    def taken(*given: Any) -> None:
        rollback(NAME, None, "it rhymes", undecided.config().resources)
        given[1].check()

    monkeypatch.setattr(tick, "_decide", taken)
    assert undecided.tick(BETTER).outcome == "superseded"
    assert Decisions.of(NAME, undecided.config().resources).notes().running == ""
    assert told(undecided) == before


def test_a_name_that_no_tick_ever_held_has_no_log(schedule: Schedule) -> None:
    log = TickLog(Decisions.of("nobody", schedule.config().resources))
    log.add("failed", "the text is away")
    assert log.all() == []
    assert not (schedule.folder / "store" / "retrain" / "nobody").exists()


def test_a_store_that_is_away_replaces_no_error(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*given: Any) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(TickLog, "add", away)
    take_away_text(schedule)
    with pytest.raises(ConfigError):
        schedule.tick()


def test_of_ticks_that_write_at_once_none_is_lost_and_each_month_has_a_file(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks, "now", lambda: "2026-11-30T23:59:59+00:00")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: log_of(schedule).add("busy", "another works"), range(24)))
    monkeypatch.setattr(ticks, "now", lambda: "2026-12-01T00:00:01+00:00")
    log_of(schedule).add("busy", "another works")
    assert [(line.count, line.at[:7]) for line in log_of(schedule).all()] == [(24, "2026-11"), (1, "2026-12")]
    months = sorted(path.name for path in (schedule.folder / "store" / "retrain" / NAME / "ticks").glob("*.json"))
    assert months == ["2026-11.json", "2026-12.json"]
