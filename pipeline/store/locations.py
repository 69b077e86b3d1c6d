"""Where a run keeps its store, its record of runs and its scratch files, from what `resources` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.store.objects import open_objects

if TYPE_CHECKING:
    from pipeline.config.resources import Resources


def storage_uri(resources: Resources) -> str:
    """Return the store's root, a directory as an absolute path, with the namespace below it."""
    open_objects(resources.storage_uri)  # refuses what is neither a directory nor S3
    root = resources.storage_uri.rstrip("/")
    root = root if root.startswith("s3://") else str(Path(root).expanduser().resolve())
    return f"{root}/{resources.namespace}" if resources.namespace else root


def anchored(resources: Resources) -> Resources:
    """Return the resources with absolute paths, for workers, which have working directories of their own."""
    root = storage_uri(resources.model_copy(update={"namespace": None}))
    return resources.model_copy(update={"storage_uri": root, "local_cache_dir": scratch_dir(resources)})


def tracking_uri(resources: Resources) -> str:
    """Return the MLflow server, or a SQLite file beside the store."""
    return resources.tracking_uri or registry_beside(resources.storage_uri)


def make_scratch_dir(resources: Resources) -> str:
    """Make the folder of `scratch_dir` on this machine, and return its path. Raises ConfigError: it cannot be made."""
    scratch = Path(scratch_dir(resources)).expanduser()
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The scratch folder {scratch} cannot be made: {error}. Set resources.storage_uri or "
            "resources.local_cache_dir to a directory you may write to."
        ) from error
    return str(scratch)


def registry_beside(storage_uri: str) -> str:
    """Return the SQLite file that records the runs of a store unless they are sent to a server."""
    folder = Path("bitmill-store" if storage_uri.startswith("s3://") else storage_uri.removeprefix("file://"))
    return f"sqlite:///{folder.expanduser().resolve() / 'mlflow.db'}"


def scratch_dir(resources: Resources) -> str:
    """Return where temporary files and fetched copies go on each node; the knob is resources.local_cache_dir."""
    if resources.local_cache_dir:
        return resources.local_cache_dir
    if resources.storage_uri.startswith("s3://"):
        return "~/.cache/bitmill"  # each node's own
    return str(Path(resources.storage_uri).expanduser().resolve() / ".scratch")
