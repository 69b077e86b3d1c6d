"""Which registered models meet some constraints, and the nearest ones if none does.

The registry cannot say: metrics belong to logged models, names and versions to the registry, and a search of versions
takes no metrics and returns neither aliases nor the id of the logged model. So a lookup joins the three, by our own
key and filtered by the server as far as it can.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import ConfigError
from pipeline.quant.spec import BitWidths
from pipeline.store.locations import registry_beside
from pipeline.tracking.query import MIB, Found, Miss, Wanted, ordered, shortcomings
from pipeline.tracking.registry import FORMATS_TAG, OWN_FORMAT, PAGE, pages
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
) -> list[Found]:
    """Registered models that meet all constraints (the fields of `Wanted`), the best first.

    The registry is `tracking_uri`, else the one beside `storage_uri`, else what MLFLOW_TRACKING_URI says, else the one
    beside ./bitmill-store.

    Raises:
        ConfigError: the registry cannot be reached, or no model has the metric to order by.
    """
    unknown = constraints.keys() - Wanted.__dataclass_fields__.keys()
    if unknown:
        valid = ", ".join(Wanted.__dataclass_fields__)
        raise ConfigError(f"lookup takes no {sorted(unknown)[0]!r}; valid: {valid}, order_by, limit")
    uri = tracking_uri or (MLFLOW_TRACKING_URI.get() if storage_uri is None else None)
    client = reach(uri or registry_beside(storage_uri or "./bitmill-store"))
    return matches(client, Wanted(**constraints), order_by, limit)


def reach(uri: str) -> MlflowClient:
    """A client, if a registry is there; unlike a run, a question neither makes one nor waits for a server.

    Raises:
        ConfigError: it is not there.
    """
    advice = "Set --tracking-uri or MLFLOW_TRACKING_URI to a server, or --storage-uri to the store of the runs."
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise ConfigError(f"There is no registry at {uri!r}: nothing was registered there yet. {advice}")
    if uri.startswith(("http://", "https://")):
        try:
            requests.get(uri, timeout=PROBE_S)
        except requests.RequestException as error:
            cause = type(error).__name__
            raise ConfigError(f"The registry at {uri!r} cannot be reached ({cause}). {advice}") from error
    try:
        return connect(uri)
    except SQLAlchemyError as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(f"The registry at {uri!r} cannot be reached ({cause}). {advice}") from error


def matches(client: MlflowClient, wanted: Wanted, order_by: str | None, limit: int | None) -> list[Found]:
    """Versions that meet all constraints, in order of a metric, each in its natural direction."""
    wanted = _checked(wanted, limit)
    fitting = [found for found in versions(client, wanted) if not shortcomings(found, wanted)]
    return ordered(fitting, order_by or wanted.measure, strict=order_by is not None)[:limit]


def nearest(client: MlflowClient, wanted: Wanted, count: int = 3) -> list[Miss]:
    """The versions that come nearest: fewest constraints failed, then the smallest sum of relative excess."""
    wanted = _checked(wanted, count)
    misses = []
    for found in versions(client, Wanted()):
        failed = shortcomings(found, wanted)
        misses.append(Miss(found, tuple(reason for reason, _ in failed), sum(distance for _, distance in failed)))
    return sorted(misses, key=lambda miss: (len(miss.reasons), miss.distance))[:count]


def versions(client: MlflowClient, wanted: Wanted) -> list[Found]:
    """Our versions that the server thinks fitting; what it cannot judge is left to the caller.

    Raises:
        ConfigError: the registry refused.
    """
    tags = {"bitmill.task": wanted.task, "bitmill.bits": wanted.bits}
    tagged = [f"tags.`{tag}` = {_quoted(value)}" for tag, value in tags.items() if value is not None]
    named = [f"name = {_quoted(wanted.name)}"] if wanted.name is not None else []
    measured = [limit.server_side for limit in wanted.limits()]
    try:
        with _uncollected():
            return _joins(client, named, tagged, measured)
    except MlflowException as error:
        raise ConfigError(f"The registry refused the search: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes more than half of the time over so many objects that all live on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _joins(client: MlflowClient, named: list[str], tagged: list[str], measured: list[str]) -> list[Found]:
    models = {model.tags[KEY_TAG]: model for model in _models(client, " and ".join(tagged + measured) or None)}
    ours = [v for v in _versions(client, named + tagged, models.values()) if v.tags.get(KEY_TAG) in models]
    aliases = _aliases(client, {version.name for version in ours})
    return [
        _joined(version, models[version.tags[KEY_TAG]], aliases.get((version.name, int(version.version)), ()))
        for version in ours
    ]


def _versions(client: MlflowClient, conditions: list[str], models: Collection[LoggedModel]) -> Iterator[ModelVersion]:
    """Versions that meet the conditions; if the models are few, asked for by their runs, else all."""
    runs = sorted({model.source_run_id for model in models})
    some: list[list[str]] = [runs[start : start + RUNS_A_CALL] for start in range(0, len(runs), RUNS_A_CALL)]
    by_runs = [[f"run_id IN ({', '.join(map(_quoted, part))})"] for part in some]
    for extra in by_runs if len(runs) <= FEW_RUNS else [[]]:
        condition = " and ".join(conditions + extra) or None

        def page(token: str | None, condition: str | None = condition) -> Any:
            return client.search_model_versions(condition, max_results=PAGE, page_token=token)

        yield from pages(page)


def _models(client: MlflowClient, condition: str | None) -> Iterator[LoggedModel]:
    experiments = [
        experiment.experiment_id
        for experiment in pages(lambda token: client.search_experiments(max_results=PAGE, page_token=token))
    ]
    for start in range(0, len(experiments), EXPERIMENTS_A_CALL):
        some = experiments[start : start + EXPERIMENTS_A_CALL]

        def page(token: str | None, some: list[str] = some) -> Any:
            return client.search_logged_models(some, condition, max_results=PAGE, page_token=token)

        yield from (model for model in pages(page) if model.status == LoggedModelStatus.READY and KEY_TAG in model.tags)


def _aliases(client: MlflowClient, names: set[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    """Aliases by name and version. A search of registered models has them, one of versions does not."""
    aliases: dict[tuple[str, int], tuple[str, ...]] = {}
    if not names:
        return aliases
    condition = f"name = {_quoted(next(iter(names)))}" if len(names) == 1 else None
    for model in pages(lambda token: client.search_registered_models(condition, max_results=PAGE, page_token=token)):
        for alias, version in sorted(model.aliases.items()):
            at = (model.name, int(version))
            aliases[at] = (*aliases.get(at, ()), alias)
    return aliases


def _joined(version: ModelVersion, model: LoggedModel, aliases: Iterable[str]) -> Found:
    latest: dict[str, Any] = {}
    for metric in model.metrics or ():  # a registration that was repeated has logged some twice
        if metric.key not in latest or metric.timestamp >= latest[metric.key].timestamp:
            latest[metric.key] = metric
    metrics = {name: float(metric.value) for name, metric in sorted(latest.items())}
    tags = version.tags
    size = metrics.get("packed_bytes")
    return Found(
        name=version.name,
        version=int(version.version),
        aliases=tuple(aliases),
        task=tags.get("bitmill.task", ""),
        bits=tags.get("bitmill.bits", ""),
        quantizer=tags.get("bitmill.quantizer", ""),
        size_mib=None if size is None else size / MIB,
        metrics=metrics,
        package_uri=tags.get("bitmill.package_uri", ""),
        formats=tuple(part for part in tags.get(FORMATS_TAG, OWN_FORMAT).split(",") if part),
        created_at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
    )


def _checked(wanted: Wanted, limit: int | None) -> Wanted:
    """The same with bits in their one spelling. Raises ConfigError for values that can match nothing."""
    for bound in wanted.limits():
        if not math.isfinite(bound.bound):
            raise ConfigError(f"--{bound.knob.replace('_', '-')} is {bound.bound}; it takes a finite number")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it takes 1 or more")
    if wanted.bits is None:
        return wanted
    try:
        return Wanted(**{**wanted.__dict__, "bits": str(BitWidths.parse(wanted.bits))})
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _quoted(text: str) -> str:
    """A value of MLflow's filters, which know no escape for their own quotes.

    Raises:
        ConfigError: it holds both kinds.
    """
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise ConfigError(f"{text!r} holds both kinds of quotes, which no registered name or tag of ours does.")
