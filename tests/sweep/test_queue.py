"""What is written down of a sweep's trials, and what counts of it when another driver takes the sweep over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run import Config
from pipeline.errors import FencedOffError
from pipeline.store.objects import open_objects
from pipeline.store.records import Trial
from pipeline.sweep.queue import TrialQueue, stored_sharing, stored_trials
from pipeline.sweep.run import PAGE, SweepPlan, _queue, plan_sweep
from pipeline.tracking.outbox import Outbox
from tests.conftest import Recorder


@pytest.fixture
def planned(tiny_config: Callable[..., Config], tmp_path: Path) -> SweepPlan:
    return plan_sweep(tiny_config(tmp_path, sweep={"space": {"quant.bits": ["4-4-8", "8-8-8"]}}), retry_failed=True)


def trial(key: str, status: Any) -> Trial:
    return Trial(key=key, bits="2-2-8", values={}, status=status, step_keys={"distill": key})


def test_a_driver_that_was_taken_over_adds_no_trial_and_changes_none(planned: SweepPlan, tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox") as outbox:
        with planned.step_dir.hold(False, print) as first:
            queue = _queue(planned, first, outbox, Recorder())
            queue.keep(trial("a", "done"))
            queue.charge("shared", 5.0)
        with planned.step_dir.hold(False, print) as second:
            queue = _queue(planned, second, outbox, Recorder())
            written = second.read("1/trials/a.json")
            store = open_objects(planned.step_dir.uri)
            store.write("1/trials/a.json", written.replace(b'"done"', b'"running"'))
            store.write("1/trials/b.json", written.replace(b'"a"', b'"b"'))
            store.write("1/shared/seconds.json", b'{"shared": 7, "of another": 1}')
            assert stored_trials(second) == stored_trials(planned.step_dir) == {"a": trial("a", "done")}
            assert stored_sharing(second) == {"shared": 5.0}
            queue.keep(trial("c", "running"))
    assert [*stored_trials(planned.step_dir)] == ["a", "c"]


def test_what_is_written_of_a_trial_in_another_shape_counts_as_absent(planned: SweepPlan) -> None:
    with planned.step_dir.hold(False, print) as held:
        for number, other in enumerate((b"{}", b"[]", b'{"index": 0, "trial": {}}', b'{"index": [], "trial": {}}')):
            held.write(f"trials/{number}.json", other)
        held.write("shared/seconds.json", b"[]")
        assert (stored_trials(held), stored_sharing(held)) == ({}, {})


def test_the_page_goes_before_what_it_shows(
    planned: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: TrialQueue, trial: Trial) -> None:
        raise KeyboardInterrupt

    with Outbox(tmp_path / "outbox") as outbox:
        with planned.step_dir.hold(False, print) as first:
            _queue(planned, first, outbox, Recorder()).keep(trial("a", "failed"))
        late = planned.step_dir.last_attempt()
        late.write(PAGE, b"of a trial that failed")
        monkeypatch.setattr(TrialQueue, "keep", killed)
        with pytest.raises(KeyboardInterrupt), planned.step_dir.hold(False, print) as second:
            _queue(planned, second, outbox, Recorder())
    assert PAGE not in late.newest()
    with pytest.raises(FencedOffError, match="no longer ours"):
        late.write(PAGE, b"drawn before, by one that was stopped")
