"""Data sets of several files: which belong to a split, as their README or their folder says, found by `datasets`.

Only that is its part: the files are pinned by content and read as any others are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of a folder that `save_to_disk` wrote
SPLIT_OF = {"data.validation": "validation", "data.test": "test"}  # where none is named; else train


def folder_files(folder: Path, config: str | None, split: str | None, knob: str) -> list[Path]:
    """Return the files of a split of a data set in a folder. Raises ConfigError: it has no such split."""
    if (folder / SAVED_SPLITS).is_file() or (folder / SAVED).is_file():
        return _saved_files(folder, config, split, knob)
    return [Path(file) for file in files_of_set(str(folder.resolve()), None, config, split, knob)]


def _saved_files(folder: Path, config: str | None, split: str | None, knob: str) -> list[Path]:
    if (folder / SAVED_SPLITS).is_file():
        known = _names(folder / SAVED_SPLITS, lambda saved: saved["splits"], knob)
        name = split or SPLIT_OF.get(knob, "train")
        if name not in known:
            raise ConfigError(f"{knob}: {folder} has no split {name!r}; valid: {', '.join(known)}")
        folder, split = folder / name, None
    if config is not None or split is not None:
        raise ConfigError(f"{knob}: {folder} was written by save_to_disk and has no config or split to choose.")
    return [folder / name for name in _names(folder / SAVED, _saved_names, knob)]


def _saved_names(saved: Any) -> list[Any]:
    return [file["filename"] for file in saved["_data_files"]]


def _names(path: Path, listed: Callable[[Any], list[Any]], knob: str) -> list[str]:
    """Return the names that a file of `save_to_disk` lists. Raises ConfigError: none, or one that lies elsewhere."""
    try:
        names = [str(name) for name in listed(json.loads(path.read_text(encoding="utf-8")))]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{knob}: {path} is damaged: {error!r}") from error
    elsewhere = [name for name in names if name in ("", "..") or Path(name).name != name]
    if elsewhere:
        raise ConfigError(f"{knob}: {path} names {elsewhere[0]!r}, which lies in another folder.")
    return names


def files_of_set(path: str, revision: str | None, config: str | None, split: str | None, knob: str) -> list[str]:
    """Return the files of a split of a data set, a folder or a repository of the hub at a commit.

    Raises:
        ConfigError: it has no such config or split, or is nothing but a script.
        OSError: it cannot be read.
    """
    import datasets

    try:
        described = datasets.load_dataset_builder(path, config, revision=revision).config
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{knob}: {path} is no data set that can be read: {error}") from error
    name = split or SPLIT_OF.get(knob, "train")
    known = described.data_files or {}
    if name not in known:
        raise ConfigError(f"{knob}: {path} has no split {name!r}; valid: {', '.join(map(str, known))}")
    return [str(file) for file in known[name]]
