"""Text in Google's and Azure's stores, through `fsspec` and its packages for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pipeline.errors import ConfigError, RunError

PACKAGES = {"gs": "gcsfs", "az": "adlfs"}  # that fsspec needs, by scheme
CLOUDS = tuple(f"{scheme}://" for scheme in PACKAGES)
VERSIONS = ("generation", "etag", "ETag", "content_md5", "md5Hash")  # what an object has that changes with its content


def cloud_files(source: str, knob: str, matches: Callable[[str, str], bool]) -> list[tuple[str, str, int]]:
    """Return place, content and bytes of each object that `source`, scheme://bucket/glob, means: `matches` tells it of
    a name and the glob.

    Raises:
        ConfigError: the package for it is not installed, it cannot be listed, or an object has no version.
    """
    scheme, _, rest = source.partition("://")
    bucket, _, pattern = rest.partition("/")
    try:
        listed: dict[str, Any] = _files(scheme).find(f"{bucket}/{_fixed(pattern)}", detail=True)
    except ImportError as error:
        raise ConfigError(
            f"{knob} is {source!r}, which needs a package; run: pip install {PACKAGES[scheme]}"
        ) from error
    except Exception as error:  # of whichever client the package brings
        raise ConfigError(f"{knob}: {source!r} cannot be listed: {error!r}") from error
    files = []
    for name, info in sorted(listed.items()):
        if matches(name.partition("/")[2], pattern):
            content = _content(info)
            if content is None:
                raise ConfigError(
                    f"{knob}: {scheme}://{name} has none of {', '.join(VERSIONS)}, by which it is pinned."
                )
            files.append((f"{scheme}://{name}", content, int(info["size"])))
    return files


def _files(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme)


def _fixed(pattern: str) -> str:
    """Return the folders before the first part of a glob that has wildcards."""
    folders = pattern.split("/")[:-1]
    fixed = next((i for i, folder in enumerate(folders) if set(folder) & set("*?[")), len(folders))
    return "/".join(folders[:fixed])


def _content(info: dict[str, Any]) -> str | None:
    version = next((f"{name}:{info[name]}" for name in VERSIONS if info.get(name)), None)
    return None if version is None else f"{version}:{info['size']}"


@contextlib.contextmanager
def open_cloud(uri: str, content: str, ahead: int) -> Iterator[BinaryIO]:
    """Open an object for reading at any place. Raises RunError: it is no longer what was pinned."""
    scheme, _, name = uri.partition("://")
    files = _files(scheme)
    files.invalidate_cache()
    if _content(files.info(name)) != content:
        raise RunError(f"data: {uri} changed after the plan was made. Give the command again.")
    with files.open(name, "rb", block_size=max(ahead, 2**16)) as stream:
        yield stream
