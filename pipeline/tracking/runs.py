"""MLflow runs, found or created by our own key, so that a run is recorded once however often it is started."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.environment_variables import MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_USERNAME
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from pipeline.credentials import came_with_a_uri, credentials_of, with_credentials
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
    """Return a client of the command's own server; a SQLite store is created. Raises ConfigError as `client_of`."""
    # Parts of MLflow resolve models:/ URIs through its global setting, whatever the client was given.
    client = client_of(tracking_uri)
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    return client


def client_of(tracking_uri: str) -> MlflowClient:
    """Return a client of any server; MLflow's global setting stays. Raises ConfigError if it cannot be reached."""
    database = sqlite_file(tracking_uri)
    try:
        if database is not None and not database.exists():
            _create(database)
        opened = _admitted(tracking_uri)
        client = MlflowClient(tracking_uri=opened, registry_uri=opened)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError, ImportError) as error:
        raise ConfigError(
            f"resources.tracking_uri {tracking_uri!r} cannot be reached: {str(error).splitlines()[0]}. Set it to a "
            "server, or leave it out for a SQLite file beside the store."
        ) from error
    return client


def _admitted(uri: str) -> str:
    """Return what MLflow opens: a database by its URI as it was given. To a server MLflow shows, at each request, what
    the environment says then. Raises ConfigError if that was given with the URI of another server."""
    if uri.startswith(tuple(DATABASE_ENGINES)):
        return with_credentials(uri)
    variables = MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD
    if (given := credentials_of(uri)) is not None:
        for variable, value in zip(variables, given, strict=True):
            variable.set(value)
    elif came_with_a_uri((variables[0].get(), variables[1].get())):
        raise ConfigError(f"{uri!r} is not shown the user and password that were given with the URI of another server.")
    return uri


def sqlite_file(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite store, or None for a server."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)).resolve() if tracking_uri.startswith(prefix) else None


def _create(database: Path) -> None:
    """Make a SQLite store that is there only once it is whole: MLflow migrates its file table by table, and takes no
    file up where another process was about it, or was killed in the middle of it."""
    database.parent.mkdir(parents=True, exist_ok=True)
    lock, draft = (database.with_name(f".{database.name}.{suffix}") for suffix in ("lock", "new"))
    with open(lock, "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not database.exists():  # the first to come makes it, and who waited finds it
            draft.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{draft}", str(database.parent / "mlflow-artifacts")).engine.dispose()
            draft.rename(database)
        lock.unlink(missing_ok=True)  # nobody makes anything under another one: the database is there


def experiment_id(client: MlflowClient, name: str, artifact_uri: str | None) -> str:
    """Return the id of the project's experiment, created at first use."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_uri))
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def find_or_create_run(client: MlflowClient, experiment: str, key: str, name: str) -> Run:
    """Return the run tagged with the key."""
    with _ONE_AT_A_TIME:  # two threads that look before either creates would make two
        tagged = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return tagged[0] if tagged else client.create_run(experiment, tags={KEY_TAG: key}, run_name=name)


def tell(client: MlflowClient, key: str, tags: dict[str, str], texts: dict[str, str]) -> None:
    """Tag the run of a key, in whatever experiment, and add files to it, unless the tags are there, or the run is
    not."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1):
        if any(run.data.tags.get(tag) != value for tag, value in tags.items()):
            for file, text in texts.items():
                client.log_text(run.info.run_id, text, file)
            for tag, value in tags.items():  # last: where they are, all is
                client.set_tag(run.info.run_id, tag, value)


def log_run(
    client: MlflowClient,
    run: Run,
    params: dict[str, Any],
    recipe: dict[str, Any],
    metrics: dict[str, float],
    curves: Mapping[str, Sequence[dict[str, float]]],
) -> None:
    """Log params, the recipe, final metrics and curves; then the run is finished. Raises RunError if refused."""
    try:
        points = [point for stage, history in curves.items() for point in prefixed(stage, history)]
        Curves(client, run).log(points, int(time.time() * 1000), None)
        _complete(client, run, params, metrics, {"recipe.json": json.dumps(recipe, indent=1, sort_keys=True)}, 0)
    except MlflowException as error:
        raise RunError(f"MLflow refused the run {run.info.run_id}: {str(error).splitlines()[0]}") from error


def _complete(
    client: MlflowClient, run: Run, params: dict[str, Any], metrics: dict[str, float], texts: dict[str, str], ms: int
) -> None:
    run_id = run.info.run_id
    for name, value in params.items():
        if name not in run.data.params:
            client.log_param(run_id, name, value)
    for name, text in texts.items():
        client.log_text(run_id, text, name)
    _log_points(client, run_id, [Metric(name, float(value), ms, 0) for name, value in metrics.items()])
    client.set_terminated(run_id)


def _log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    finite = [point for point in points if math.isfinite(point.value)]
    for start in range(0, len(finite), METRICS_A_CALL):
        client.log_batch(run_id, metrics=finite[start : start + METRICS_A_CALL])


def prefixed(stage: str, points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return points with the stage before each name, as a run has them."""
    return [{name if name == "step" else f"{stage}/{name}": v for name, v in point.items()} for point in points]


class Curves:
    """A run that goes on, and the steps it has of each curve: a killed driver loses points, which may be sent later."""

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
    """Return the curves of a run as `find_run` gives it."""
    return Curves(client_of(target.uri), find_run(target))


def find_run(target: Target) -> Run:
    """Return the run of a key, found or created, nested as `nest` does. Raises ConfigError, MlflowException."""
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


@contextlib.contextmanager
def refusal(what: str, advice: str = "") -> Iterator[None]:
    """Turn what MLflow raises, or a server that cannot be reached any more, into a RunError that begins with `what` and
    ends with `advice`."""
    try:
        yield
    except (MlflowException, ConfigError) as error:  # it was reached when the command began: no setting is at fault
        cause = error.__cause__ or error
        raise RunError(f"{what}: {str(cause).splitlines()[0]}. {advice}".rstrip()) from error


def log_sweep(target: Target, params: dict[str, Any], metrics: dict[str, float], documents: dict[str, str]) -> None:
    """Log the parent run of a sweep: params, numbers, and its tables as artifacts; then it is finished."""
    run = find_run(target)
    _complete(client_of(target.uri), run, params, metrics, documents, int(time.time() * 1000))


def log_page(target: Target, file: str, text: str) -> None:
    """Log a page as an artifact of the run that `find_run` gives. Raises RunError: the server refused."""
    with refusal(f"MLflow refused {file}", "The same command tries again."):
        client_of(target.uri).log_text(find_run(target).info.run_id, text, file)


def system_load() -> Callable[[], dict[str, float]]:
    """Return what measures this machine's processors, memory, disk and network, by the names that MLflow gives them."""
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, network_monitor

    monitors = (cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor())

    def sample() -> dict[str, float]:
        load: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            load |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return load

    return sample


def log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, Any]) -> None:
    """Log Matplotlib figures as pictures of a run, by file name."""
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"pictures/{name}")
