"""Lookups of registered models that meet some constraints, and of the nearest ones if none does.

The registry cannot say: metrics belong to logged models, names and versions to the registry, and a search of versions
takes no metrics and returns neither aliases nor the id of the logged model. So a lookup joins the three, by our own
key and filtered by the server as far as it can.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.credentials import without_credentials
from pipeline.errors import ConfigError
from pipeline.quant.spec import BitWidths
from pipeline.store.locations import registry_beside
from pipeline.tracking.query import MIB, VALIDATION, NearMiss, Query, RegisteredModel, ranked, shortcomings
from pipeline.tracking.registry import FORMATS_TAG, OWN_FORMAT, pages
from pipeline.tracking.runs import KEY_TAG, connect, sqlite_file

EXPERIMENTS_A_CALL = 100
RUNS_A_CALL = 100
FEW_RUNS = 500  # for more, one search of all versions is cheaper
PROBE_S = 10.0


def lookup(
    *,
    order_by: str | None = None,
    limit: int | None = None,
    tracking_uri: str | None = None,
    storage_uri: str | None = None,
    **constraints: Any,
) -> list[RegisteredModel]:
    """Return registered models that meet all constraints (the fields of `Query`), the best first. Both look at
    validation; `metrics` of a model are those of the test split.

    The registry is `tracking_uri`, else the one beside `storage_uri`, else what MLFLOW_TRACKING_URI says, else the one
    beside ./bitmill-store.

    Raises:
        ConfigError: the registry cannot be reached, or no model has the metric to order by.
    """
    unknown = constraints.keys() - Query.__dataclass_fields__.keys()
    if unknown:
        valid = ", ".join(Query.__dataclass_fields__)
        raise ConfigError(f"lookup takes no {sorted(unknown)[0]!r}; valid: {valid}, order_by, limit")
    uri = tracking_uri or (MLFLOW_TRACKING_URI.get() if storage_uri is None else None)
    client = reach(uri or registry_beside(storage_uri or "./bitmill-store"))
    return matches(client, Query(**constraints), order_by, limit)


def reach(uri: str) -> MlflowClient:
    """Return a client, if a registry is there: a question makes none and waits for none. Raises ConfigError if not."""
    advice = "Set --tracking-uri or MLFLOW_TRACKING_URI to a server, or --storage-uri to the store of the runs."
    try:
        uri = without_credentials(uri)
    except ValueError as error:
        raise ConfigError(f"The registry's URI cannot be read: {error}. {advice}") from error
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise ConfigError(f"There is no registry at {uri!r}: nothing was registered there yet. {advice}")
    try:
        if uri.startswith(("http://", "https://")):
            requests.get(uri, timeout=PROBE_S)
        return connect(uri)
    except (requests.RequestException, SQLAlchemyError) as error:
        cause = str(error).splitlines()[0] if isinstance(error, SQLAlchemyError) else type(error).__name__
        raise ConfigError(f"The registry at {uri!r} cannot be reached ({cause}). {advice}") from error


def matches(client: MlflowClient, wanted: Query, order_by: str | None, limit: int | None) -> list[RegisteredModel]:
    """Return the versions that meet all constraints, in order of a metric, each in its natural direction, both on
    validation."""
    wanted = _checked(wanted, limit)
    fitting = [model for model in versions(client, wanted) if not shortcomings(model, wanted)]
    return ranked(fitting, order_by or wanted.measure, required=order_by is not None)[:limit]


def nearest_misses(client: MlflowClient, wanted: Query, count: int = 3) -> list[NearMiss]:
    """Return the versions that come nearest: fewest constraints failed, then the smallest sum of relative excess."""
    wanted = _checked(wanted, count)
    misses = []
    for model in versions(client, Query()):
        failed = shortcomings(model, wanted)
        misses.append(NearMiss(model, tuple(reason for reason, _ in failed), sum(distance for _, distance in failed)))
    return sorted(misses, key=lambda miss: (len(miss.reasons), miss.distance))[:count]


def versions(client: MlflowClient, wanted: Query) -> list[RegisteredModel]:
    """Return our versions that the server thinks fitting; callers judge the rest. Raises ConfigError if it refuses."""
    tags = {"bitmill.task": wanted.task, "bitmill.bits": wanted.bits}
    tagged = [f"tags.`{tag}` = {_quoted(value)}" for tag, value in tags.items() if value is not None]
    named = [f"name = {_quoted(wanted.name)}"] if wanted.name is not None else []
    try:
        with _uncollected():
            return _joins(client, named, tagged, [limit.server_side for limit in wanted.limits()])
    except MlflowException as error:
        raise ConfigError(f"The registry refused the search: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Suspend garbage collection, which takes more than half of the time over so many objects that all live on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _joins(client: MlflowClient, named: list[str], tagged: list[str], measured: list[str]) -> list[RegisteredModel]:
    models = {model.tags[KEY_TAG]: model for model in _models(client, " and ".join(tagged + measured) or None)}
    ours = [v for v in _versions(client, named + tagged, models.values()) if v.tags.get(KEY_TAG) in models]
    aliases = _aliases(client, {version.name for version in ours})
    return [
        _joined(version, models[version.tags[KEY_TAG]], aliases.get((version.name, int(version.version)), ()))
        for version in ours
    ]


def _versions(client: MlflowClient, conditions: list[str], models: Collection[LoggedModel]) -> Iterator[ModelVersion]:
    """Yield the versions that meet the conditions; if the models are few, asked for by their runs, else all."""
    runs = sorted({model.source_run_id for model in models})
    parts = (runs[start : start + RUNS_A_CALL] for start in range(0, len(runs), RUNS_A_CALL))
    by_runs = [[f"run_id IN ({', '.join(map(_quoted, part))})"] for part in parts]
    for extra in by_runs if len(runs) <= FEW_RUNS else [[]]:
        yield from pages(client.search_model_versions, " and ".join(conditions + extra) or None)


def _models(client: MlflowClient, condition: str | None) -> Iterator[LoggedModel]:
    experiments = [experiment.experiment_id for experiment in pages(client.search_experiments)]
    for start in range(0, len(experiments), EXPERIMENTS_A_CALL):
        models = pages(client.search_logged_models, experiments[start : start + EXPERIMENTS_A_CALL], condition)
        yield from (model for model in models if model.status == LoggedModelStatus.READY and KEY_TAG in model.tags)


def _aliases(client: MlflowClient, names: set[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    """Return aliases by name and version. A search of registered models has them, one of versions does not."""
    aliases: dict[tuple[str, int], tuple[str, ...]] = {}
    if not names:
        return aliases
    condition = f"name = {_quoted(next(iter(names)))}" if len(names) == 1 else None
    for model in pages(client.search_registered_models, condition):
        for alias, version in sorted(model.aliases.items()):
            at = (model.name, int(version))
            aliases[at] = (*aliases.get(at, ()), alias)
    return aliases


def _joined(version: ModelVersion, model: LoggedModel, aliases: Iterable[str]) -> RegisteredModel:
    latest: dict[str, Any] = {}
    for metric in model.metrics or ():  # a registration that was repeated has logged some twice
        if metric.key not in latest or metric.timestamp >= latest[metric.key].timestamp:
            latest[metric.key] = metric
    metrics = {name: float(metric.value) for name, metric in sorted(latest.items())}
    validation = {name.removeprefix(VALIDATION): v for name, v in metrics.items() if name.startswith(VALIDATION)}
    tags = version.tags
    size = metrics.get("packed_bytes")
    return RegisteredModel(
        name=version.name,
        version=int(version.version),
        aliases=tuple(aliases),
        task=tags.get("bitmill.task", ""),
        bits=tags.get("bitmill.bits", ""),
        quantizer=tags.get("bitmill.quantizer", ""),
        size_mib=None if size is None else size / MIB,
        metrics={name: value for name, value in metrics.items() if not name.startswith(VALIDATION)},
        validation=validation,
        package_uri=tags.get("bitmill.package_uri", ""),
        formats=tuple(part for part in tags.get(FORMATS_TAG, OWN_FORMAT).split(",") if part),
        created_at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
    )


def _checked(wanted: Query, limit: int | None) -> Query:
    """Return the same with bits in their one spelling. Raises ConfigError for values that can match nothing."""
    for bound in wanted.limits():
        if not math.isfinite(bound.bound):
            raise ConfigError(f"--{bound.knob.replace('_', '-')} is {bound.bound}; it takes a finite number")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it takes 1 or more")
    if wanted.bits is None:
        return wanted
    try:
        return replace(wanted, bits=str(BitWidths.parse(wanted.bits)))
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _quoted(text: str) -> str:
    """Quote a value for MLflow's filters, which know no escape. Raises ConfigError if it holds both kinds of quotes."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise ConfigError(f"{text!r} holds both kinds of quotes, which no registered name or tag of ours does.")
