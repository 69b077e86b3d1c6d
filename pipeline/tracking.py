"""MLflow runs, found or created by our own key, so that a run is recorded once however often it is started."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from pipeline.errors import ConfigError, RunError

KEY_TAG = "bitmill.key"
METRICS_A_CALL = 500

for _name in ("alembic", "mlflow"):  # each start of a SQLite store logs its migrations
    logging.getLogger(_name).setLevel(logging.ERROR)


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the tracking server and registry; a SQLite store is created with its folder.

    Raises:
        ConfigError: it cannot be reached.
    """
    # Parts of MLflow resolve models:/ URIs through its global setting, whatever the client was given.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
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


def experiment(client: MlflowClient, name: str, artifact_uri: str | None) -> str:
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


def find_or_create_run(client: MlflowClient, experiment_id: str, key: str, name: str) -> Run:
    """The run tagged with the key."""
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return found[0] if found else client.create_run(experiment_id, tags={KEY_TAG: key}, run_name=name)


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
        points = [
            Metric(f"{stage}/{name}", float(value), 0, int(entry["step"]))
            for stage, history in curves.items()
            for entry in history
            for name, value in entry.items()
            if name != "step"
        ]
        points += [Metric(name, float(value), 0, 0) for name, value in metrics.items()]
        points = [point for point in points if math.isfinite(point.value)]
        for start in range(0, len(points), METRICS_A_CALL):
            client.log_batch(run_id, metrics=points[start : start + METRICS_A_CALL])
        client.set_terminated(run_id)
    except MlflowException as error:
        raise RunError(f"MLflow refused the run {run_id}: {str(error).splitlines()[0]}") from error


def log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, Any]) -> None:
    """Matplotlib figures as pictures of a run, by file name."""
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"pictures/{name}")
