"""Every tick is in the history: those that decided nothing too."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.errors import ConfigError, FencedOffError, RunError
from pipeline.retrain import tick, ticks
from pipeline.retrain.decisions import Deciding, Decisions
from pipeline.retrain.rollback import rollback
from pipeline.retrain.ticks import LONGEST, MOST, Month, TickLog, Ticks, timeline
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
    assert (line.outcome, line.count, line.after) == ("unchanged", 3, 2)
    assert line.told().startswith(f"3 ticks, the last at {line.last}: nothing is new since")
    rollback(NAME, None, "it rhymes", undecided.config().resources)
    undecided.tick(BETTER)
    assert told(undecided) == [*before, ("unchanged", 3), ("unchanged", 1)]
    lines = timeline(undecided.decisions[::-1], log_of(undecided).all()[len(before) :])
    assert [line.outcome if isinstance(line, Ticks) else line.decision for line in lines] == [
        *("promoted", "promoted", "unchanged", "rolled back", "unchanged")
    ]


def test_a_busy_tick_is_written_down_by_itself(schedule: Schedule) -> None:
    with Decisions.of(NAME, schedule.config().resources).held():
        assert [schedule.tick().outcome for _ in range(2)] == ["busy", "busy"]
    (line,) = log_of(schedule).all()
    assert (line.outcome, line.count) == ("busy", 2)
    assert line.reason.startswith(f"The retraining of {NAME} is")


def test_a_tick_that_fails_leaves_its_error_without_its_secrets(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([RunError("https://me:s3cret@host is away.\n" + "x" * LONGEST), KeyError("x"), KeyError("x")])

    def away(*given: Any) -> None:
        raise next(errors)

    with monkeypatch.context() as patched:
        patched.setattr(tick, "_decide", away)
        schedule.grow(2)
        for kind in (RunError, KeyError, KeyError):
            with pytest.raises(kind):
                schedule.tick(BETTER)  # once it held the name
    take_away_text(schedule)
    with pytest.raises(ConfigError, match="no file matches"):
        schedule.tick(BETTER)  # before
    schedule.grow(1)
    schedule.tick()
    *lines, _ = log_of(schedule).all()
    assert told(schedule) == [("failed", 1), ("failed", 2), ("failed", 1), ("unchanged", 1)]  # none as killed
    assert lines[0].reason.startswith("https://host is away. xxx")
    assert len(lines[0].reason) == LONGEST
    assert lines[1].reason == "KeyError: 'x'"
    assert lines[2].reason.startswith("data.source is")


def test_a_step_that_another_command_took_is_a_fault_of_this_tick(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*given: Any) -> None:
        raise FencedOffError("The distill step is no longer ours")

    monkeypatch.setattr(tick, "_decide", taken)
    schedule.grow(2)
    with pytest.raises(FencedOffError):
        schedule.tick(BETTER)
    assert told(schedule) == [("failed", 1)]


@pytest.mark.parametrize("at", ["_decide", "append"])
@pytest.mark.parametrize("rolled_back", [False, True], ids=["", "a rollback between"])
def test_a_tick_that_was_killed_is_written_down_by_the_next(undecided: Schedule, at: str, rolled_back: bool) -> None:
    before = told(undecided)
    if rolled_back:
        undecided.tick(BETTER)
        undecided.grow(3)

    def child() -> None:
        if at == "append":
            tick._decide = lambda *given: undecided.decisions[0]
        holder: Any = tick if at == "_decide" else Deciding
        setattr(holder, at, lambda *given: os._exit(KILLED))
        undecided.tick(BETTER)

    assert ended(in_a_process_of_its_own(child)) == KILLED
    assert told(undecided) == before
    if rolled_back:
        rollback(NAME, None, "it rhymes", undecided.config().resources)
        (undecided.folder / "text" / "2.jsonl").unlink()
    undecided.tick(BETTER)
    line = log_of(undecided).all()[len(before)]
    assert (line.outcome, line.count) == ("failed", 1)
    assert "left no word" in line.reason


def test_a_tick_that_a_rollback_ended_was_not_killed(undecided: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    undecided.tick(BETTER)
    before = told(undecided)
    undecided.grow(3)

    def taken(*given: Any) -> None:
        rollback(NAME, None, "it rhymes", undecided.config().resources)
        given[1].check()

    monkeypatch.setattr(tick, "_decide", taken)
    assert undecided.tick(BETTER).outcome == "busy"
    assert Decisions.of(NAME, undecided.config().resources).notes().running == ""
    assert told(undecided) == [*before, ("busy", 1)]


def test_a_name_that_no_tick_ever_held_has_no_log(schedule: Schedule) -> None:
    log = TickLog(Decisions.of("nobody", schedule.config().resources))
    log.add("failed", "the text is away")
    assert log.all() == []
    assert not (schedule.folder / "store" / "retrain" / "nobody").exists()


def test_a_store_that_is_away_replaces_no_error_and_fails_no_tick(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*given: Any) -> bool:
        raise OSError("the store is away")

    monkeypatch.setattr(TickLog, "_added", away)
    assert schedule.tick().outcome == "unchanged"
    take_away_text(schedule)
    with pytest.raises(ConfigError, match="no file matches"):
        schedule.tick()


def test_outcomes_in_turn_are_two_lines_and_a_month_of_faults_is_bounded() -> None:
    month = Month()
    for number in range(6):
        month = month.with_one(("unchanged", "busy")[number % 2], f"for the {number}. time", "2026-11-30T00:00:00", 1)
    assert [(line.outcome, line.count, line.reason[-7:]) for line in month.ticks] == [
        ("unchanged", 3, "4. time"),
        ("busy", 3, "5. time"),
    ]
    for number in range(3 * MOST):
        month = month.with_one("failed", f"at {number}", "2026-11-30T00:00:00", 1)
    assert len(month.ticks) == MOST
    assert sum(line.count for line in month.ticks) == 6 + 3 * MOST
    assert month.with_one("failed", "anew", "2026-11-30T00:00:00", 2).ticks[-1].after == 2


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
