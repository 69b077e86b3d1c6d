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
from pipeline.package.manifest import MANIFEST, check, intact, read_manifest
from pipeline.store.objects import open_objects

Fetch = Callable[[str, Path], Path]  # a file's name, and a scratch folder it may be put into: where it is now


@dataclass(frozen=True)
class Pulled:
    """The outcome of a pull: what was brought, and what an earlier attempt had brought already."""

    manifest: dict[str, Any]
    fetched: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def from_store(uri: str) -> Fetch:
    """Return a fetch of the files of a package in a directory, or below an S3 prefix."""
    return open_objects(uri).local


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
        kept = tuple(name for name, entry in manifest["files"].items() if intact(staging / name, entry))
        fetched = tuple(name for name in manifest["files"] if name not in kept)
        for name in fetched:
            _fetch(fetch, name, staging, model, manifest["files"][name])
        staging.replace(destination)
    return Pulled(manifest, fetched, kept)


@contextlib.contextmanager
def _alone_in(staging: Path, destination: Path) -> Iterator[None]:
    """Lock the destination while inside, at most for the process: two pulls would take each other's files away."""
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
    """Return the same package, whole: nothing to do. Anything else is left alone."""
    with contextlib.suppress(DamagedError):
        manifest = check(destination)
        with tempfile.TemporaryDirectory() as scratch:
            _fetch(fetch, MANIFEST, Path(scratch), model)
            if read_manifest(Path(scratch)) == manifest:
                return Pulled(manifest, kept=tuple(manifest["files"]))
    raise ConfigError(
        f"DEST is {str(destination)!r}, where something else lies already. Name a directory that does not exist yet, "
        "or an empty one."
    )


def _fetch(fetch: Fetch, name: str, folder: Path, model: str, entry: dict[str, Any] | None = None) -> None:
    """Fetch one file into the folder, under its name only after it was checked."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        try:
            path = fetch(name, Path(scratch))
            if entry is not None and not intact(path, entry):
                raise DamagedError(
                    f"MODEL is {model!r}, and its {name} is not what its manifest says; DEST was not made. The package "
                    "is damaged where it lies: pull it from another place, or pack it again."
                )
            if not path.is_relative_to(scratch):
                path = Path(shutil.copyfile(path, Path(scratch) / "copy"))
                if entry is not None and not intact(path, entry):
                    raise DamagedError(f"MODEL is {model!r}, and its {name} changed while it was read. Pull it again.")
            path.replace(folder / name)
        except FileNotFoundError:
            raise ConfigError(f"MODEL is {model!r}, and no packed model lies there: it has no {name}.") from None
        except OSError as error:
            raise ConfigError(f"MODEL is {model!r}, whose {name} cannot be brought to {folder}: {error}") from error


def _refuse_links(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(f"DEST: {path} is a link to somewhere else; name a directory, or remove the link.")


def _remove_all_but(names: set[str], folder: Path) -> None:
    """Remove what an earlier pull of something else, or one that was killed, left behind."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names or path.is_symlink() or not path.is_file():
            path.unlink()
