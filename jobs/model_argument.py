"""What the argument MODEL means: a directory, a store URI, `name@alias` or `name/version`."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.models.build import load_model
from pipeline.package.manifest import MANIFEST
from pipeline.package.package import load
from pipeline.package.pull import Fetch, from_store, pull
from pipeline.store.locations import tracking_uri
from pipeline.tracking import registry, runs


def is_registered(model: str) -> bool:
    """Tell whether it is a name in the registry, and no directory or URI. Raises ConfigError for an empty one."""
    if not model:
        raise ConfigError("MODEL is empty; name a directory, a store URI, name@alias or name/version.")
    return "://" not in model and not os.path.isdir(model)  # which is False for what no path can be


def files_of(model: str, resources: Resources) -> Fetch:
    """Return how to get at its files. Raises ConfigError if the registry has no such model."""
    if not is_registered(model):
        return from_store(model)
    return registry.files(runs.connect(tracking_uri(resources)), model)


def locate(model: str, resources: Resources, folder: Path) -> Path:
    """Return a directory as it is; anything else is a package, brought to `folder`, every byte checked. Raises
    ConfigError if there is no such model, or it cannot be reached; DamagedError if it is not what its manifest says."""
    if not is_registered(model) and "://" not in model:
        return Path(model)
    pull(files_of(model, resources), folder, model)
    return folder


def pinned(model: str, resources: Resources) -> str:
    """Return `name/version` for a registered model, so that an alias which moves meanwhile changes nothing. Raises
    ConfigError if the registry has no such model."""
    if not is_registered(model):
        return model
    version = registry.resolve(runs.connect(tracking_uri(resources)), model)
    return f"{version.name}/{version.version}"


def open_model(folder: Path) -> PreTrainedModel:
    """Load a packed model if the folder has a manifest, else a Hugging Face directory."""
    if (folder / MANIFEST).exists():
        return load(folder)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"MODEL is {str(folder)!r}: neither a packed model nor a directory with *.safetensors.")
    return load_model(folder).eval()
