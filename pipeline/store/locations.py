"""Where a run keeps its store, its record of runs and its scratch files, from what `resources` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.store.objects import open_objects

if TYPE_CHECKING:  # the schema imports torch, which takes longer than a lookup
    from pipeline.config.resources import Resources


def storage_uri(resources: Resources) -> str:
    """The store's root, a directory as an absolute path, with the namespace below it."""
    open_objects(resources.storage_uri)  # refuses what is neither a directory nor S3
    root = resources.storage_uri.rstrip("/")
    root = root if root.startswith("s3://") else str(Path(root).expanduser().resolve())
    return f"{root}/{resources.namespace}" if resources.namespace else root


def anchored(resources: Resources) -> Resources:
    """With absolute places, for workers, which have working directories of their own."""
    root = storage_uri(resources.model_copy(update={"namespace": ""}))
    return resources.model_copy(update={"storage_uri": root, "local_cache_dir": scratch_dir(resources)})


def tracking_uri(resources: Resources) -> str:
    """The MLflow server, or a SQLite file beside the store."""
    return resources.tracking_uri or registry_beside(resources.storage_uri)


def registry_beside(storage_uri: str) -> str:
    """The SQLite file that records the runs of a store unless they are sent to a server."""
    folder = Path("bitmill-store" if storage_uri.startswith("s3://") else storage_uri.removeprefix("file://"))
    return f"sqlite:///{folder.expanduser().resolve() / 'mlflow.db'}"


def scratch_dir(resources: Resources) -> str:
    """Where temporary files and fetched copies go on each node; the knob is resources.local_cache_dir."""
    if resources.local_cache_dir:
        return resources.local_cache_dir
    if resources.storage_uri.startswith("s3://"):
        return "~/.cache/bitmill"  # each node's own
    return str(Path(resources.storage_uri).expanduser().resolve() / ".scratch")
