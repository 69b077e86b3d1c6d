"""MLflow runs, found or created by our own key, so that a run is recorded once however often it is started."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipeline.errors import ConfigError, RunError

FAULTS = (MlflowException, OSError)  # what a server that cannot be reached raises
KEY_TAG, PARENT_TAG = "bitmill.key", "mlflow.parentRunId"
METRICS_A_CALL = 500

_ONE_AT_A_TIME = threading.Lock()

for _name in ("alembic", "mlflow"):  # each start of a SQLite store logs its migrations
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Target:
    """A run by its key; `parent` is the key of the run that it is nested in."""

    uri: str
    experiment: str
    artifacts: str | None
    key: str
    name: str
    parent: str | None = None


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the command's own tracking server and registry; a SQLite store is created with its folder.

    Raises:
        ConfigError: it cannot be reached.
    """
    # Parts of MLflow resolve models:/ URIs through its global setting, whatever the client was given.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    return client_of(tracking_uri)


def client_of(tracking_uri: str) -> MlflowClient:
    """A client of any server, which leaves MLflow's global setting alone.

    Raises:
        ConfigError: it cannot be reached.
    """
    database = sqlite_file(tracking_uri)
    try:
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"resources.tracking_uri {tracking_uri!r} cannot be reached: {str(error).splitlines()[0]}. Set it to a "
            "server, or leave it out for a SQLite file beside the store."
        ) from error
    return client


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of a SQLite store, or None for a server."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)).resolve() if tracking_uri.startswith(prefix) else None


def experiment_id(client: MlflowClient, name: str, artifact_uri: str | None) -> str:
    """The id of the project's experiment, created at first use."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifact_uri))
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def find_or_create_run(client: MlflowClient, experiment: str, key: str, name: str) -> Run:
    """The run tagged with the key."""
    with _ONE_AT_A_TIME:  # two threads that look before either creates would make two
        found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return found[0] if found else client.create_run(experiment, tags={KEY_TAG: key}, run_name=name)


def log_run(
    client: MlflowClient,
    run: Run,
    params: dict[str, Any],
    recipe: dict[str, Any],
    metrics: dict[str, float],
    curves: Mapping[str, Sequence[dict[str, float]]],
) -> None:
    """A dozen params, the whole recipe as JSON, final metrics and curves with steps; then the run is finished.

    Raises:
        RunError: the server refused.
    """
    run_id = run.info.run_id
    try:
        for name, value in params.items():
            if name not in run.data.params:
                client.log_param(run_id, name, value)
        client.log_text(run_id, json.dumps(recipe, indent=1, sort_keys=True), "recipe.json")
        points = [point for stage, history in curves.items() for point in prefixed(stage, history)]
        Curves(client, run).log(points, int(time.time() * 1000), None)
        _log_points(client, run_id, [Metric(name, float(value), 0, 0) for name, value in metrics.items()])
        client.set_terminated(run_id)
    except MlflowException as error:
        raise RunError(f"MLflow refused the run {run_id}: {str(error).splitlines()[0]}") from error


def _log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    finite = [point for point in points if math.isfinite(point.value)]
    for start in range(0, len(finite), METRICS_A_CALL):
        client.log_batch(run_id, metrics=finite[start : start + METRICS_A_CALL])


def prefixed(stage: str, points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Points with the stage before each name, as a run has them."""
    return [{name if name == "step" else f"{stage}/{name}": v for name, v in point.items()} for point in points]


class Curves:
    """A run that is going on, and which steps of each of its curves it has.

    A driver that is killed loses points on their way to it, which its next life may send after later ones.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client, self._run_id = client, run.info.run_id
        names = [name for name in run.data.metrics if "/" in name]
        self._sent = {name: {m.step for m in client.get_metric_history(self._run_id, name)} for name in names}

    def log(self, points: Sequence[dict[str, float]], time_ms: int, status: str | None) -> None:
        """Send what was not sent; points without a step are counted. `status`, such as KILLED, ends the run."""
        fresh = []
        for point in points:
            for name, value in point.items():
                sent = self._sent.setdefault(name, set())
                step = int(point.get("step", max(sent, default=-1) + 1))
                if name != "step" and step not in sent:
                    fresh.append(Metric(name, float(value), time_ms, step))
                    sent.add(step)
        _log_points(self._client, self._run_id, fresh)
        if status is not None:
            self._client.set_terminated(self._run_id, status)


def open_curves(target: Target) -> Curves:
    """The curves of a run as `find_run` gives it."""
    return Curves(MlflowClient(target.uri, target.uri), find_run(target))


def find_run(target: Target) -> Run:
    """The run of a key, found or created; one that is in no other yet is nested in the run of the key `parent`.

    Raises:
        ConfigError, MlflowException: the server cannot be reached.
    """
    client = client_of(target.uri)
    where = experiment_id(client, target.experiment, target.artifacts)
    run = find_or_create_run(client, where, target.key, target.name)
    nest(target, run)
    return run


def nest(target: Target, run: Run) -> None:
    """Put a run that is in no other yet into the run of the key `target.parent`."""
    if target.parent is not None and PARENT_TAG not in run.data.tags:
        client = client_of(target.uri)
        where = experiment_id(client, target.experiment, target.artifacts)
        outer = find_or_create_run(client, where, target.parent, "sweep")
        client.set_tag(run.info.run_id, PARENT_TAG, outer.info.run_id)


def log_sweep(target: Target, params: dict[str, Any], metrics: dict[str, float], documents: dict[str, str]) -> None:
    """The parent run of a sweep: params, numbers, and its tables as artifacts; then it is finished."""
    run = find_run(target)
    client, run_id = MlflowClient(target.uri, target.uri), run.info.run_id
    for name, value in params.items():
        if name not in run.data.params:
            client.log_param(run_id, name, value)
    for name, text in documents.items():
        client.log_text(run_id, text, name)
    _log_points(
        client, run_id, [Metric(name, float(value), int(time.time() * 1000), 0) for name, value in metrics.items()]
    )
    client.set_terminated(run_id)


def log_page(target: Target, file: str, text: str) -> None:
    """A page as an artifact of the run that `find_run` gives.

    Raises:
        RunError: the server refused.
    """
    try:
        run = find_run(target)
        MlflowClient(target.uri, target.uri).log_text(run.info.run_id, text, file)
    except MlflowException as error:
        raise RunError(f"MLflow refused {file}: {str(error).splitlines()[0]}. The same command tries again.") from error


def system_load() -> Callable[[], dict[str, float]]:
    """What measures this machine's processors, memory, disk and network, by the names that MLflow gives them."""
    monitors = (CPUMonitor(), DiskMonitor(), NetworkMonitor())

    def sample() -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return found

    return sample


def log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, Any]) -> None:
    """Matplotlib figures as pictures of a run, by file name."""
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"pictures/{name}")
