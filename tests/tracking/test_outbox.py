"""Curves to MLflow while a run goes on: nothing is lost when the server is away, nothing is sent twice."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlflow
import pytest

from pipeline.store.lease import Owner
from pipeline.tracking import outbox, runs
from pipeline.tracking.mlflow_listener import MlflowListener
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.runs import Target
from tests.conftest import Recorder

AWAY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(outbox, "GIVE_UP_AFTER_S", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def target(uri, key="k" * 32, parent=None):
    return Target(uri, "project", None, key, "2-2-8", parent)


def at(step, nats):
    return {"step": step, "distill/loss": nats}


def history(uri, name="distill/loss", key="k" * 32):
    client = runs.connect(uri)
    (run,) = [
        run
        for run in client.search_runs([client.get_experiment_by_name("project").experiment_id])
        if run.data.tags[runs.KEY_TAG] == key
    ]
    return run, [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_points_arrive_with_their_steps_and_the_run_is_nested(uri, tmp_path):
    recorder = Recorder()
    with Outbox(tmp_path / "outbox") as outbox:
        run = MlflowListener(recorder, outbox, target(uri, parent="p" * 32))
        run.measured("distill", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation_nats": 1.5}])
        run.advanced("distill", 2, 9, "note")
        outbox.put(target(uri), [{"system/cpu_utilization_percentage": 50.0}])
    assert outbox.unsent == {}
    assert not list((tmp_path / "outbox").iterdir())
    run, losses = history(uri)
    assert losses == [(1, 3.0), (2, 2.0)]
    parent, _ = history(uri, key="p" * 32)
    assert run.data.tags[runs.PARENT_TAG] == parent.info.run_id
    assert history(uri, "system/cpu_utilization_percentage")[1] == [(0, 50.0)]
    assert recorder.progress == {"distill": (2, 9)}
    assert [stage for stage, _ in recorder.points] == ["distill"] * 2


def test_a_run_that_goes_on_sends_no_step_twice(uri, tmp_path):
    for points in ([at(1, 3.0), at(2, 2.0)], [at(2, 2.0), at(3, 1.0)]):
        with Outbox(tmp_path / "outbox") as outbox:
            outbox.put(target(uri), points)
    assert history(uri)[1] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_what_was_not_sent_is_named_and_sent_by_the_next_command(uri, tmp_path, monkeypatch):
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(target(AWAY), [at(1, 3.0), at(2, 2.0)])
    assert outbox.unsent == {"2-2-8": 2}
    assert "2-2-8 (2)" in outbox.told()
    assert str(outbox.path) in outbox.told()
    (path,) = (tmp_path / "outbox").iterdir()
    assert path == outbox.path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["points"] for line in lines] == [[at(1, 3.0), at(2, 2.0)]]

    # The server is back, at another place, and the process that wrote the lines has ended.
    lines[0]["target"]["uri"] = uri
    path.unlink()
    host = Owner.this_process().host
    (tmp_path / "outbox" / f"{host}~{os.getpid()}~0~a.jsonl").write_text(json.dumps(lines[0]) + '\n{"half a li')
    with Outbox(tmp_path / "outbox") as later:
        pass
    assert later.unsent == {}
    assert history(uri)[1] == [(1, 3.0), (2, 2.0)]
    assert not list((tmp_path / "outbox").iterdir())


def test_an_interrupted_command_does_not_wait_for_a_server_that_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "GIVE_UP_AFTER_S", 1e9)
    monkeypatch.setattr(outbox.time, "sleep", lambda seconds: pytest.fail("it waits"))
    waiting = Outbox(tmp_path / "outbox")

    def interrupted():
        with waiting:
            waiting.put(target(AWAY), [at(1, 3.0)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert waiting.unsent == {"2-2-8": 1}


def test_what_another_machine_or_a_living_command_left_is_let_be(uri, tmp_path):
    folder = tmp_path / "outbox"
    with Outbox(folder) as living:
        living.put(target(AWAY), [at(1, 3.0)])
        elsewhere = folder / "elsewhere~1~1~a.jsonl"
        elsewhere.write_text("")
        assert Outbox(folder).unsent == {}
        assert sorted(folder.iterdir()) == sorted([elsewhere, living.path])


def test_points_that_were_lost_on_their_way_are_sent_by_the_registration(uri, tmp_path):
    runs.connect(uri)
    there = replace(target(uri), artifacts=f"file://{tmp_path}/artifacts")
    for points in ([at(0, 4.0), at(20, 2.0)], [at(30, 1.0)]):
        runs.open_curves(there).log(points, 0, None)
    client, run = runs.connect(uri), runs.find_run(there)
    whole = [{"step": step, "loss": nats} for step, nats in ((0, 4.0), (10, 3.0), (20, 2.0), (30, 1.0))]
    runs.log_run(client, run, {}, {}, {"perplexity": 9.0}, {"distill": whole})
    assert sorted(history(uri)[1]) == [(0, 4.0), (10, 3.0), (20, 2.0), (30, 1.0)]


def test_a_server_that_is_away_keeps_back_its_own_lines_alone(uri, tmp_path):
    own = f"sqlite:///{tmp_path}/own.db"
    runs.connect(own)
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(target(AWAY, key="a" * 32), [at(1, 9.0)])
        outbox.put(target(uri), [at(1, 3.0)])
        outbox.put(target(AWAY, key="a" * 32), [at(2, 8.0)])
        outbox.put(target(uri), [at(2, 2.0)], "FINISHED")
    assert mlflow.get_tracking_uri() == own  # lines for elsewhere do not change where a command registers
    assert history(uri)[1] == [(1, 3.0), (2, 2.0)]
    lines = [json.loads(line) for line in outbox.path.read_text().splitlines()]
    assert [line["points"] for line in lines] == [[at(1, 9.0)], [at(2, 8.0)]]


def test_many_threads_make_one_run(uri):
    client = runs.connect(uri)
    where = runs.experiment_id(client, "project", None)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.find_or_create_run(client, where, "k" * 32, "x"), range(8)))
    assert len({run.info.run_id for run in made}) == 1
    assert len(client.search_runs([where])) == 1


def test_an_ended_run_is_marked(uri, tmp_path):
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(target(uri), [at(1, 3.0)])
        outbox.put(target(uri), [], "KILLED")
    assert history(uri)[0].info.status == "KILLED"


def test_the_load_of_the_machine_has_mlflows_names():
    load = runs.system_load()()
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= load.keys()
