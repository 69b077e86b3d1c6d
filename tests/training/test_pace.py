"""The pace of a training job: means over the steps since the last restart."""

from __future__ import annotations

from pipeline.training import pace
from pipeline.training.pace import Pace
from tests.conftest import Recorder


def test_seconds_and_tokens_are_means_over_the_steps_since_the_restart(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    counted = Pace()
    counted.steps, counted.tokens, counted.waited_s = 7, 7, 7.0
    counted.restart()
    counted.steps, counted.tokens, counted.waited_s = 2, 1000, 0.5
    assert counted.point(9) == {"step": 9, "step_s": 2.0, "data_wait_s": 0.25, "tokens_per_s": 250.0}


def test_a_training_job_tells_its_pace_and_its_record_does_not_keep_it(finished):
    heard: Recorder = finished.listener
    paces = [point for stage, point in heard.points if stage == "distill" and "step_s" in point]
    assert paces
    assert all(point["tokens_per_s"] > 0 for point in paces)
    assert all(0 <= point["data_wait_s"] <= point["step_s"] for point in paces)
    assert "step_s" not in finished.record("distill").model_dump_json()


def test_the_bytes_of_a_cache_are_told_while_it_grows(finished):
    told = [point["cache_bytes"] for stage, point in finished.listener.points if stage == "cache"]
    assert told == sorted(told)
    assert told[-1] == finished.record("cache").bytes
