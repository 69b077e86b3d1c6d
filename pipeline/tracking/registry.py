"""MLflow's registry: packed models as versions, found by key; the alias of the first one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion as RegisteredVersion
from mlflow.exceptions import MlflowException

from pipeline.errors import ConfigError, RunError
from pipeline.tracking import runs
from pipeline.tracking.runs import KEY_TAG

PAGE = 1000  # entities that one request asks for
CHAMPION, FIRST = "champion", "1"
MISSING = "RESOURCE_DOES_NOT_EXIST"
FORMATS_TAG, OWN_FORMAT = "bitmill.formats", "bitmill"  # every package is itself a format


def find_version(client: MlflowClient, name: str, key: str) -> RegisteredVersion | None:
    """The version of `name` that is tagged with the step's key."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return found[0] if found else None


def registered(uri: str, name: str, key: str) -> bool:
    """Whether the registry at `uri` holds the version of a key. Raises ConfigError if it cannot be reached."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return False
    return find_version(runs.connect(uri), name, key) is not None


def pages(call: Callable[[str | None], Any]) -> Iterator[Any]:
    """Every entity of a search, page after page."""
    token: str | None = None
    while True:
        page = call(token)
        yield from page
        token = page.token
        if not token:
            return


def held_keys(uri: str, name: str) -> set[str]:
    """Keys of all versions of `name` in the registry at `uri`. Raises ConfigError if it cannot be reached."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return set()
    client, condition = runs.connect(uri), f"name = '{name}'"
    found = pages(lambda token: client.search_model_versions(condition, PAGE, page_token=token))
    return {version.tags[KEY_TAG] for version in found if KEY_TAG in version.tags}


def register_package(
    client: MlflowClient,
    run_id: str,
    experiment_id: str,
    name: str,
    key: str,
    folder: Path,
    tags: dict[str, str],
    metrics: dict[str, float],
) -> tuple[RegisteredVersion, str]:
    """Log a package folder as a model, unless an interrupted attempt did, and make it a version."""
    tagged = f"tags.`{KEY_TAG}` = '{key}'"
    logged = client.search_logged_models([experiment_id], filter_string=tagged)
    model = next((m for m in logged if m.status == LoggedModelStatus.READY), None)
    if model is None:
        model = client.create_logged_model(
            experiment_id=experiment_id, name=name, source_run_id=run_id, tags={**tags, KEY_TAG: key}
        )
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    for metric, value in metrics.items():
        client.log_metric(run_id, metric, value, model_id=model.model_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=run_id,
        tags={**tags, KEY_TAG: key},
        model_id=model.model_id,
    )
    return version, str(model.model_id)


def crown(client: MlflowClient, name: str) -> None:
    """The first version under a name is its champion until something else is promoted."""
    if CHAMPION not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, CHAMPION, FIRST)


def aliases_of(client: MlflowClient, name: str, version: str) -> tuple[str, ...]:
    """Aliases that point at a version (a search returns none)."""
    aliases: dict[str, Any] = client.get_registered_model(name).aliases
    return tuple(sorted(alias for alias, at in aliases.items() if str(at) == str(version)))


def files(client: MlflowClient, model: str, tracking_uri: str) -> Callable[[str, Path], Path]:
    """A function that downloads one file of `name@alias` or `name/version` by its name into a folder.

    Raises:
        ConfigError: the registry has no such model.
    """
    found = resolve(client, model)
    root = f"models:/{found.name}/{found.version}"  # an alias may move meanwhile

    def fetch(file: str, folder: Path) -> Path:
        try:
            return Path(
                download_artifacts(artifact_uri=f"{root}/{file}", dst_path=str(folder), tracking_uri=tracking_uri)
            )
        except MlflowException as error:
            if error.error_code == MISSING:
                raise FileNotFoundError(file) from error
            raise OSError(str(error).splitlines()[0]) from error

    return fetch


def resolve(client: MlflowClient, model: str) -> RegisteredVersion:
    """The version that `name@alias` or `name/version` means.

    Raises:
        ConfigError: the registry has no such model.
    """
    try:
        return _version_of(client, model)
    except MlflowException as error:
        known = ", ".join(m.name for m in client.search_registered_models(max_results=20)) or "none"
        raise ConfigError(
            f"MODEL is {model!r}: no such directory, and the registry does not have it "
            f"({str(error).splitlines()[0]}). Registered models: {known}."
        ) from error


def _version_of(client: MlflowClient, model: str) -> RegisteredVersion:
    name, _, alias = model.partition("@")
    if alias:
        return client.get_model_version_by_alias(name, alias)
    name, _, version = model.rpartition("/")
    return client.get_model_version(name, version)


def keep_verdict(client: MlflowClient, model: str, format: str, passed: bool, verdict: dict[str, Any]) -> None:
    """An export's verdict beside the run that made the model, and the formats that passed as a tag of the version and
    its logged model: comma-separated, sorted, `bitmill` always among them.

    Raises:
        RunError: the server refused.
    """
    try:
        version = _version_of(client, model)
        model_id = version.source.removeprefix(
            "models:/"
        )  # a version that is fetched does not always tell its model_id
        client.log_text(version.run_id, json.dumps(verdict, indent=1), f"exports/{format}.json")
        if passed:
            for name in ("delta_max", "delta_p999", "covered", "perplexity_export", "bytes"):
                client.log_metric(version.run_id, f"export/{format}/{name}", verdict[name], model_id=model_id)
        others = set(version.tags.get(FORMATS_TAG, OWN_FORMAT).split(",")) - {format}
        formats = ",".join(sorted(others | ({format} if passed else set())))
        client.set_model_version_tag(version.name, version.version, FORMATS_TAG, formats)
        client.set_logged_model_tags(model_id, {FORMATS_TAG: formats})
    except MlflowException as error:
        raise RunError(f"MLflow refused the verdict on {model}: {str(error).splitlines()[0]}.") from error
