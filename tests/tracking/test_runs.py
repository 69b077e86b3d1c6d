"""A registry in a SQLite file: made once, whole, however many come at once and however one of them ends."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from sqlalchemy import Engine, event

from pipeline.tracking import runs

FORK = multiprocessing.get_context("fork")  # real processes, without the seconds of their imports


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/store/mlflow.db"


def begin(uri, key, barrier=None):
    """What each command does first."""
    if barrier is not None:
        barrier.wait()
    client = runs.connect(uri)
    runs.find_or_create_run(client, runs.experiment_id(client, "project", None), key * 32, key)


def killed_while_it_migrates(uri):
    def execute(connection, cursor, statement, *more):
        if statement.lstrip().startswith("ALTER TABLE"):
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", execute)
    begin(uri, "k")


def codes(processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_commands_that_come_at_once_to_a_fresh_store_all_find_it_whole(uri, tmp_path):
    barrier = FORK.Barrier(3)
    assert codes([FORK.Process(target=begin, args=(uri, key, barrier)) for key in "abc"]) == [0, 0, 0]
    client = runs.connect(uri)
    logged = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert sorted(run.info.run_name for run in logged) == ["a", "b", "c"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mlflow.db"]


def test_one_that_is_killed_while_it_makes_the_store_leaves_nothing_half_made(uri, tmp_path):
    assert codes([FORK.Process(target=killed_while_it_migrates, args=(uri,))]) == [-signal.SIGKILL]
    assert not (tmp_path / "store" / "mlflow.db").exists()
    begin(uri, "a")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mlflow.db"]
