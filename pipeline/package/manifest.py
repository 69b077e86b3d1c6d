"""The manifest of a package, and what its config.json may not set: read before anything in it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError, RunError
from pipeline.package.safe_read import read_json_file
from pipeline.store.step_store import checksum

FORMAT_VERSION = 1
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "manifest.json", "config.json"
# Settings of config.json that could fetch or run code, name other files, or ask for memory; no package has them
REFUSED = (
    "auto_map",
    "configuration_files",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "transformers_weights",
    "fusion_config",
    "kernel_config",
    "num_labels",
)
COUNTS = re.compile(r"(?!max_)\w*(layers?|experts)")  # settings by which a model builds so many parts
POSITIVE = re.compile(r"\w*(layers?|heads?|positions|position_embeddings)")
MOST_PARTS = 1000
PLAIN = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}")


def check(folder: Path) -> dict[str, Any]:
    """Check every byte against the manifest, which is returned.

    Raises:
        DamagedError: a file is missing, altered, a link, or not listed by a plain name. Hidden files alone may lie
            beside those that are listed: nothing reads them.
        RunError: a newer format.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink():
            raise DamagedError(f"{path} is a link to somewhere else; a package holds plain files.")
        if not intact(path, entry):
            raise DamagedError(f"{path} is missing or does not match the manifest.")
    if read_settings(folder / CONFIG)["quantization_config"].get("digest") != manifest["digest"]:
        raise DamagedError(f"{folder / MANIFEST} has another digest than {CONFIG}.")
    known = {*manifest["files"], MANIFEST}
    strange = next((path for path in folder.iterdir() if path.name not in known and path.name[0] != "."), None)
    if strange is not None:
        raise DamagedError(f"{strange} is not listed in {MANIFEST}; a package holds nothing else.")
    return manifest


def intact(path: Path, entry: dict[str, Any]) -> bool:
    """Tell whether a plain file, and no link to one, is what its entry in a manifest says."""
    plain = path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == entry["bytes"] and checksum(path).sha256 == entry["sha256"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, which lists files by plain names, with a size and a SHA-256 each. Raises as `check` does."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise DamagedError(
            f"{folder} is not a packed model: it has no {MANIFEST}. What save_pretrained wrote has none: transformers "
            "loads it after `import pipeline.plugin`."
        )
    try:
        manifest = dict(read_json_file(path))
        version, digest = manifest["format_version"], str(manifest["digest"])
        listed = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    _refuse_newer(folder, version)
    if re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise DamagedError(f"{path} has the digest {digest[:80]!r}, which is no SHA-256.")
    for name in listed:  # of the folder itself; the manifest cannot hold its own checksum
        if name == MANIFEST or PLAIN.fullmatch(name) is None:
            raise DamagedError(f"{path} lists the file {name!r}, which is not a plain name.")
    for name in (WEIGHTS, CONFIG):
        if name not in listed:
            raise DamagedError(f"{path} does not list {name}.")
    return {**manifest, "files": listed, "digest": digest}


def _refuse_newer(folder: Path, version: Any) -> None:
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise RunError(
            f"{folder} has format_version {version!r}; this bitmill reads up to {FORMAT_VERSION}. Upgrade bitmill."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Return the fields of a package's config.json, with a `quantization_config`.

    Raises:
        DamagedError: it is not one of a package, or sets what could run code, read other files, or ask for memory.
        RunError: a newer format.
    """
    try:
        fields = dict(read_json_file(path))
        fields["quantization_config"] = dict(fields["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    refused = next((name for name in REFUSED if name in fields), None)
    if refused is not None:
        raise DamagedError(f"{path} sets {refused!r}, which no package does: it could run code or read other files.")
    _refuse_newer(path.parent, fields["quantization_config"].get("format_version"))
    for name, value in _settings(fields):
        if isinstance(value, float) and not math.isfinite(value):
            raise DamagedError(f"{path} sets {name!r} to {value}.")
        if isinstance(value, int) and value < 1 and POSITIVE.fullmatch(name) and not isinstance(value, bool):
            raise DamagedError(f"{path} sets {name!r} to {value}; it counts what a model has.")
        if isinstance(value, int) and value > MOST_PARTS and COUNTS.fullmatch(name):
            raise DamagedError(f"{path} sets {name!r} to {value}; no model has more than {MOST_PARTS}.")
    return fields


def _settings(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)
