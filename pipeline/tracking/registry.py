"""MLflow's registry: packed models as versions, found by key; the alias of the first one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion as RegisteredVersion
from mlflow.exceptions import MlflowException

from pipeline.errors import ConfigError, RunError
from pipeline.tracking import runs
from pipeline.tracking.runs import KEY_TAG

PAGE = 1000  # entities that one request asks for
CHAMPION, PREVIOUS, FIRST = "champion", "previous", "1"
MISSING = "RESOURCE_DOES_NOT_EXIST"
PLACE_TAG = "bitmill.journal"  # of a registered model: the store whose journal decides on it
FORMATS_TAG, OWN_FORMAT = "bitmill.formats", "bitmill"  # every package is itself a format


@dataclass(frozen=True)
class Registered:
    """A version as the registry tells of it: the key of its registration, the digest of its frozen tensors, where its
    package lies, and the keys of the steps that made it, by stage."""

    name: str
    version: int
    key: str
    digest: str
    package_uri: str
    lineage: dict[str, str]

    @property
    def title(self) -> str:
        """Return its name and version as a command takes them."""
        return f"{self.name}/{self.version}"

    @property
    def start(self) -> str | None:
        """Return the title of the version from whose latent weights it was trained on."""
        return self.lineage.get("start")


def described(version: RegisteredVersion) -> Registered:
    """Return what a version's tags tell of it."""
    tags = version.tags
    return Registered(
        name=version.name,
        version=int(version.version),
        key=tags.get(KEY_TAG, ""),
        digest=tags.get("bitmill.digest", ""),
        package_uri=tags.get("bitmill.package_uri", ""),
        lineage={tag.removeprefix("bitmill."): key for tag, key in tags.items()},
    )


def registered_versions(client: MlflowClient) -> list[Registered]:
    """Return all versions of ours that the registry holds."""
    everything = pages(client.search_model_versions, "")
    return [described(version) for version in everything if KEY_TAG in version.tags]


def registered_version(uri: str, name: str, version: int | None) -> Registered | None:
    """Return a version of a name, None: that which bears the alias champion; None if the registry has none. Raises
    ConfigError if it cannot be reached, or the version is not there."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return None
    client = runs.connect(uri)
    try:
        there = _version_of(client, f"{name}@{CHAMPION}" if version is None else f"{name}/{version}")
    except MlflowException as error:
        if error.error_code not in (MISSING, "INVALID_PARAMETER_VALUE"):
            raise ConfigError(
                f"The registry at {uri!r} does not say which version of {name} is champion: "
                f"{str(error).splitlines()[0]}. Give the command again when it does."
            ) from error
        if version is None:
            return None
        raise ConfigError(
            f"{name} has no champion: by its last decision it is version {version or '?'}, which the registry at "
            f"{uri!r} does not hold ({str(error).splitlines()[0]}). Make another one champion: `bitmill rollback "
            f"{name} --to VERSION`. (`bitmill compress` registers a run again whose version was deleted.)"
        ) from error
    return described(there)


def holds(uri: str, name: str, version: int) -> bool:
    """Tell whether the registry at `uri` has a version. Raises ConfigError if it cannot be reached."""
    database = runs.sqlite_file(uri)
    return (database is None or database.exists()) and _there(runs.connect(uri), name, version)


def _there(client: MlflowClient, name: str, version: int) -> bool:
    try:
        client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return False
    return True


def place_of(uri: str, name: str) -> str | None:
    """Return the store whose journal decides on a name; None: none has so far. Raises ConfigError: the registry cannot
    be reached."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return None
    models = runs.connect(uri).search_registered_models(f"name = '{name}'")
    return models[0].tags.get(PLACE_TAG) if models else None


def find_version(client: MlflowClient, name: str, key: str) -> RegisteredVersion | None:
    """Return the version of `name` that is tagged with the step's key."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return versions[0] if versions else None


def registered(uri: str, name: str, key: str) -> bool:
    """Tell whether the registry at `uri` holds the version of a key. Raises ConfigError if it cannot be reached."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return False
    return find_version(runs.connect(uri), name, key) is not None


def pages(search: Callable[..., Any], *wanted: Any) -> Iterator[Any]:
    """Yield every entity of a search of the client, page after page; `wanted` is what the search is given first."""
    token: str | None = None
    while True:
        page = search(*wanted, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def held_keys(uri: str, name: str) -> set[str]:
    """Return keys of all versions of `name` in the registry at `uri`. Raises ConfigError if it cannot be reached."""
    database = runs.sqlite_file(uri)
    if database is not None and not database.exists():
        return set()
    versions = pages(runs.connect(uri).search_model_versions, f"name = '{name}'")
    return {version.tags[KEY_TAG] for version in versions if KEY_TAG in version.tags}


def register_package(
    client: MlflowClient, run: Run, name: str, key: str, folder: Path, tags: dict[str, str], metrics: dict[str, float]
) -> tuple[RegisteredVersion, str]:
    """Return the version tagged with the key and its logged model's id; made from what is logged, or the folder."""
    version = find_version(client, name, key)
    if version is None:
        version = _new_version(client, run, name, key, folder, {**tags, KEY_TAG: key}, metrics)
    if str(version.version) == FIRST and CHAMPION not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, CHAMPION, FIRST)  # until a tick of `bitmill retrain` promotes another
    return version, _model_id(version)


def _new_version(
    client: MlflowClient, run: Run, name: str, key: str, folder: Path, tags: dict[str, str], metrics: dict[str, float]
) -> RegisteredVersion:
    logged = client.search_logged_models([run.info.experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'")
    model = next((m for m in logged if m.status == LoggedModelStatus.READY), None)
    if model is None:
        model = client.create_logged_model(run.info.experiment_id, name, source_run_id=run.info.run_id, tags=tags)
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    for metric, value in metrics.items():
        client.log_metric(run.info.run_id, metric, value, model_id=model.model_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, source=f"models:/{model.model_id}", run_id=run.info.run_id, tags=tags, model_id=model.model_id
    )


def put_aliases(client: MlflowClient, name: str, wanted: dict[str, int | None]) -> None:
    """Put aliases of a name at versions, or nowhere (so those of a version that was deleted), and read them back.
    Raises RunError if they are elsewhere then."""
    if not client.search_registered_models(f"name = '{name}'"):
        return  # nothing was registered yet, or all was deleted
    wanted = {
        alias: version if version is not None and _there(client, name, version) else None
        for alias, version in wanted.items()
    }
    for alias, version in wanted.items():
        there = client.get_registered_model(name).aliases.get(alias)
        if version is None and there is not None:
            client.delete_registered_model_alias(name, alias)
        elif version is not None and str(there) != str(version):
            client.set_registered_model_alias(name, alias, str(version))
    there = client.get_registered_model(name).aliases
    for alias, version in wanted.items():
        if str(there.get(alias)) != str(version):
            raise RunError(
                f"The alias {alias} of {name} is at {there.get(alias)} where {version} belongs: something else moves "
                "it. Only `bitmill retrain` and `bitmill rollback` may."
            )


def tell(client: MlflowClient, name: str, version: int, tags: dict[str, str], texts: dict[str, str]) -> None:
    """Tag a version, and add files to the run that made it, unless the tags are there, or the version is not."""
    if not _there(client, name, version):
        return
    registered = client.get_model_version(name, str(version))
    if all(registered.tags.get(tag) == value for tag, value in tags.items()):
        return
    for file, text in texts.items():
        client.log_text(registered.run_id, text, file)
    for tag, value in tags.items():  # last: where they are, all is
        client.set_model_version_tag(name, str(version), tag, value)


def put_place(client: MlflowClient, name: str, place: str) -> None:
    """Write down which store decides on a name, if there is such a name and none does."""
    for model in client.search_registered_models(f"name = '{name}'"):
        if PLACE_TAG not in model.tags:
            client.set_registered_model_tag(name, PLACE_TAG, place)


def aliases_of(client: MlflowClient, name: str, version: str) -> tuple[str, ...]:
    """Return the aliases that point at a version (a search returns none)."""
    aliases: dict[str, Any] = client.get_registered_model(name).aliases
    return tuple(sorted(alias for alias, at in aliases.items() if str(at) == str(version)))


def files(client: MlflowClient, model: str) -> Callable[[str, Path], Path]:
    """Return a function that downloads a file of `model` into a folder. Raises ConfigError as `resolve` does."""
    version, uri = resolve(client, model), client.tracking_uri
    root = f"models:/{version.name}/{version.version}"  # an alias may move meanwhile

    def fetch(file: str, folder: Path) -> Path:
        try:
            path = download_artifacts(artifact_uri=f"{root}/{file}", dst_path=str(folder), tracking_uri=uri)
            return Path(path)
        except MlflowException as error:
            if error.error_code == MISSING:
                raise FileNotFoundError(file) from error
            raise OSError(str(error).splitlines()[0]) from error

    return fetch


def resolve(client: MlflowClient, model: str, knob: str | None = None) -> RegisteredVersion:
    """Return the version that `name@alias` or `name/version` means; `knob` names it, or a command's MODEL, which may
    be a directory. Raises ConfigError if the registry has none."""
    try:
        return _version_of(client, model)
    except MlflowException as error:
        known = ", ".join(m.name for m in client.search_registered_models(max_results=20)) or "none"
        given = f"{knob} is {model!r}" if knob is not None else f"MODEL is {model!r}: no such directory"
        raise ConfigError(
            f"{given}, and the registry does not have it ({str(error).splitlines()[0]}). Registered models: {known}."
        ) from error


def _version_of(client: MlflowClient, model: str) -> RegisteredVersion:
    name, _, alias = model.partition("@")
    if alias:
        return client.get_model_version_by_alias(name, alias)
    name, _, version = model.rpartition("/")
    return client.get_model_version(name, version)


def _model_id(version: RegisteredVersion) -> str:
    """Return the id of a version's logged model, from its source: the version itself does not always tell it."""
    return str(version.source).removeprefix("models:/")


def aliased(client: MlflowClient) -> dict[str, set[int | None]]:
    """Return the versions that bear an alias, by name."""
    models = pages(client.search_registered_models)
    return {model.name: {int(version) for version in model.aliases.values()} for model in models}


def keep_verdict(uri: str, model: str, format: str, passed: bool, verdict: dict[str, Any]) -> None:
    """Keep an export's verdict beside the run that made the model, and the formats that passed as a tag of the version
    and its logged model: comma-separated, sorted, `bitmill` among them. Raises RunError if the server refuses, or is
    away."""
    with runs.refusal(f"MLflow refused the verdict on {model}"):
        client = runs.connect(uri)
        version = _version_of(client, model)
        model_id = _model_id(version)
        client.log_text(version.run_id, json.dumps(verdict, indent=1), f"exports/{format}.json")
        if passed:
            for name, value in {**verdict["as_scored"], "bytes": verdict["bytes"]}.items():
                client.log_metric(version.run_id, f"export/{format}/{name}", value, model_id=model_id)
        others = set(version.tags.get(FORMATS_TAG, OWN_FORMAT).split(",")) - {format}
        formats = ",".join(sorted(others | ({format} if passed else set())))
        client.set_model_version_tag(version.name, version.version, FORMATS_TAG, formats)
        client.set_logged_model_tags(model_id, {FORMATS_TAG: formats})
