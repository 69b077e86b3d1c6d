"""A package brought to a directory: file by file, each checked, and the directory appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DamagedError
from pipeline.package.manifest import MANIFEST, check, read_manifest
from pipeline.store.objects import open_objects
from pipeline.store.step_store import checksum

Fetch = Callable[[str, Path], Path]  # a file's name, and a scratch folder it may be put into: where it is now


@dataclass(frozen=True)
class Pulled:
    """What was brought, and what an earlier attempt had brought already."""

    manifest: dict[str, Any]
    fetched: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def from_store(uri: str) -> Fetch:
    """Files of a package in a directory, or below an S3 prefix."""
    objects = open_objects(uri)

    def fetch(name: str, scratch: Path) -> Path:
        return objects.local(name, scratch)

    return fetch


def pull(fetch: Fetch, destination: Path, model: str) -> Pulled:
    """Bring a package to `destination`. What an interrupted pull had brought is verified and kept.

    Files gather in a hidden directory beside the destination, which is renamed once each byte was checked.

    Raises:
        ConfigError: something else lies at the destination, or there is no such model.
        DamagedError: a file is not what the manifest says. RunError: a newer format.
    """
    _refuse_links(destination)
    try:
        return _pull(fetch, destination, model)
    except OSError as error:
        raise ConfigError(f"DEST is {str(destination)!r}, which cannot be made: {error}") from error


def _pull(fetch: Fetch, destination: Path, model: str) -> Pulled:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        return _already_there(fetch, destination, model)
    staging = destination.with_name(f".{destination.name}.pulling")
    _refuse_links(staging)
    staging.mkdir(parents=True, exist_ok=True)
    with _alone_in(staging, destination):
        _fetch(fetch, MANIFEST, staging, model)
        manifest = read_manifest(staging)
        _remove_all_but({*manifest["files"], MANIFEST}, staging)
        kept = tuple(name for name, entry in manifest["files"].items() if _is(staging / name, entry))
        fetched = tuple(name for name in manifest["files"] if name not in kept)
        for name in fetched:
            _fetch(fetch, name, staging, model, manifest["files"][name])
        staging.replace(destination)
    return Pulled(manifest, fetched, kept)


@contextlib.contextmanager
def _alone_in(staging: Path, destination: Path) -> Iterator[None]:
    """Two pulls to one destination would take each other's files away. The lock ends with the process."""
    folder = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"DEST is {str(destination)!r}, to which another command is pulling now.") from None
        yield
    finally:
        os.close(folder)


def _already_there(fetch: Fetch, destination: Path, model: str) -> Pulled:
    """The same package, whole: nothing to do. Anything else is left alone."""
    try:
        manifest = check(destination)
        with tempfile.TemporaryDirectory() as scratch:
            _fetch(fetch, MANIFEST, Path(scratch), model)
            if read_manifest(Path(scratch)) == manifest:
                return Pulled(manifest, kept=tuple(manifest["files"]))
    except DamagedError:
        pass
    raise ConfigError(
        f"DEST is {str(destination)!r}, where something else lies already. Name a directory that does not exist yet, "
        "or an empty one."
    )


def _fetch(fetch: Fetch, name: str, folder: Path, model: str, entry: dict[str, Any] | None = None) -> None:
    """One file into the folder, under its name only after it was checked."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        try:
            found = fetch(name, Path(scratch))
            if entry is not None and not _is(found, entry):
                raise DamagedError(
                    f"MODEL is {model!r}, and its {name} is not what its manifest says; DEST was not made. The package "
                    "is damaged where it lies: pull it from another place, or pack it again."
                )
            if not found.is_relative_to(scratch):
                found = Path(shutil.copyfile(found, Path(scratch) / "copy"))
                if entry is not None and not _is(found, entry):
                    raise DamagedError(f"MODEL is {model!r}, and its {name} changed while it was read. Pull it again.")
            found.replace(folder / name)
        except FileNotFoundError:
            raise ConfigError(f"MODEL is {model!r}, and no packed model lies there: it has no {name}.") from None
        except OSError as error:
            raise ConfigError(f"MODEL is {model!r}, whose {name} cannot be brought to {folder}: {error}") from error


def _is(path: Path, entry: dict[str, Any]) -> bool:
    return (
        path.is_file()
        and not path.is_symlink()
        and path.stat().st_size == entry["bytes"]
        and checksum(path).sha256 == entry["sha256"]
    )


def _refuse_links(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(f"DEST: {path} is a link to somewhere else; name a directory, or remove the link.")


def _remove_all_but(names: set[str], folder: Path) -> None:
    """What an earlier pull of something else, or one that was killed, left behind."""
    for path in folder.iterdir():
        if path.name in names and path.is_file() and not path.is_symlink():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
