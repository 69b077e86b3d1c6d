"""Files of text: found and pinned by content when the plan is made, opened where they are read."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.config.base import Closed
from pipeline.config.data import Data
from pipeline.credentials import taking_none
from pipeline.errors import ConfigError, RunError
from pipeline.sources.content import ContentMemo
from pipeline.sources.packaged import PACKAGED_TEXT, packaged_files, packaged_texts
from pipeline.store.records import SplitName

if TYPE_CHECKING:  # boto3, for those who read from S3
    from pipeline.store.s3 import Bucket

FORMATS = {".txt": "txt", ".raw": "txt", ".tokens": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
AHEAD_BYTES = 2**20


class SourceFile(Closed):
    """One file of text: where it lies, and what it is. Only `content` and `format` enter a key."""

    uri: str
    format: str
    content: str
    bytes: int
    mtime_ns: int = 0  # of a local file, so that a later change is noticed


def pin_splits(section: Data, memo: ContentMemo) -> dict[SplitName, tuple[SourceFile, ...]]:
    """Pin the files of every split that has a source of its own.

    Raises:
        ConfigError: as `pin_text` does; a file that is in two of them; running text that is to be split by document.
    """
    sources: dict[SplitName, tuple[str, str | None]] = {
        "train": ("data.source", section.source),
        "validation": ("data.validation", section.validation),
        "test": ("data.test", section.test),
    }
    pinned = {split: pin_text(source, knob, memo) for split, (knob, source) in sources.items() if source is not None}
    rows = next((file for file in pinned["train"] if file.format != "txt"), None)
    if section.unit == "line" and rows is not None and (len(pinned) < len(sources) or section.sample < 1):
        raise ConfigError(
            f"data.unit: line takes the rows of {rows.uri} as running text, which has no documents to hold out or "
            "sample; set data.validation and data.test and leave data.sample, use unit: document, or give .txt files"
        )
    first_with: dict[str, tuple[str, str]] = {}
    for split, files in pinned.items():
        knob = sources[split][0]
        for file in files:
            other, uri = first_with.setdefault(file.content, (knob, file.uri))
            if other != knob:
                raise ConfigError(
                    f"{other} and {knob} hold the same file: {uri} and {file.uri} are equal, byte for byte. Take it "
                    f"out of one of them, or leave {knob} out, which keeps data.holdout of data.source from training."
                )
    return pinned


def pin_text(source: str, knob: str, memo: ContentMemo) -> tuple[SourceFile, ...]:
    """Return a source's files, pinned by content. Raises ConfigError: none, empty, unknown format, no such package, or
    a user or password in its URI."""
    try:
        taking_none(source)
    except ValueError as error:
        raise ConfigError(f"{knob}: {error}.") from error
    if source.startswith("python://"):
        files = _packaged_text(source, knob, memo)
    elif source.startswith("s3://"):
        files = _s3_text(source, knob)
    elif source.startswith("hf://"):
        files = _hub_text(source, knob)
    else:
        matching = map(Path, glob.glob(source, recursive=True, include_hidden=True))
        paths = sorted({path for path in matching if path.is_file()})
        files = [
            SourceFile(
                uri=str(path.resolve()),
                format=_format(path.name, knob),
                content=memo.sha256(path),
                bytes=path.stat().st_size,
                mtime_ns=path.stat().st_mtime_ns,
            )
            for path in paths
        ]
    if not files:
        raise ConfigError(
            f"{knob} is {source!r}, and no file matches it. Valid: a path or glob of .txt, .jsonl or .parquet, "
            "s3://bucket/glob, hf://org/name@commit/glob, or python://" + " or python://".join(PACKAGED_TEXT)
        )
    for file in files:
        if file.bytes == 0:
            raise ConfigError(f"{knob}: the file {file.uri} is empty.")
    return tuple(files)


def _format(name: str, knob: str) -> str:
    try:
        return FORMATS[Path(name).suffix]
    except KeyError:
        raise ConfigError(f"{knob}: {name} is of no known format; valid endings: {', '.join(FORMATS)}") from None


def _packaged_text(source: str, knob: str, memo: ContentMemo) -> list[SourceFile]:
    paths = packaged_files(source.removeprefix("python://"))
    if paths is None:
        raise ConfigError(f"{knob} is {source!r}; valid packages of text: python://{', python://'.join(PACKAGED_TEXT)}")
    return [
        SourceFile(
            uri=f"python://{name}",
            format="python",
            content=memo.sha256(path),
            bytes=int(memo.remembered(path, f"text of {name}", partial(_packaged_bytes, name))),
        )
        for name, path in paths.items()
    ]


def _packaged_bytes(name: str) -> str:
    return str(sum(len(text.encode()) for text in packaged_texts(name)))


def _s3_text(source: str, knob: str) -> list[SourceFile]:
    bucket, _, pattern = source.removeprefix("s3://").partition("/")
    fixed = re.split(r"[*?\[]", pattern)[0]
    try:
        objects = s3_bucket(bucket)
        sizes, etags = objects.sizes(fixed), objects.versions(fixed)
    except OSError as error:
        raise ConfigError(f"{knob}: {source!r} cannot be listed: {error}") from error
    return [
        SourceFile(
            uri=f"s3://{bucket}/{name}",
            format=_format(name, knob),
            content=f"etag:{etags[name]}:{sizes[name]}",
            bytes=sizes[name],
        )
        for name in sorted(sizes)
        if _matches(name, pattern) and name in etags
    ]


def _hub_text(source: str, knob: str) -> list[SourceFile]:
    """Return the files of a dataset repository, `hf://org/name@revision/glob`, pinned by commit."""
    from huggingface_hub import HfApi

    # Of whichever HTTP client this version of the hub uses; not all of its errors are the hub's own.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name, revision, pattern = _split_hub(source, knob)
    try:
        info = HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
    except (HTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{knob}: the hub does not give {source!r}: {error}") from error
    siblings = info.siblings or []
    matching = [s for s in siblings if _matches(s.rfilename, pattern)]
    if not matching and any(s.rfilename.endswith(".py") for s in siblings):
        raise ConfigError(
            f"{knob}: {name} is a data set that is a script, and scripts are not run. Pin its Parquet conversion "
            f"(hf://{name}@refs%2Fconvert%2Fparquet/**/*.parquet), or download it and give local files."
        )
    return [
        SourceFile(
            uri=f"hf://{name}@{info.sha}/{s.rfilename}",
            format=_format(s.rfilename, knob),
            content=f"hub:{name}@{info.sha}/{s.rfilename}",
            bytes=s.size or 1,
        )
        for s in sorted(matching, key=lambda s: s.rfilename)
    ]


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a glob means a file as it would on a disk, by pathlib's rules: `*` ends at a slash, `**` is any
    number of folders, none included, and a name that begins with a dot is one like any other."""
    return _parts_match(name.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":  # at the end: any file below
        return len(patterns) == 1 or any(_parts_match(parts[start:], patterns[1:]) for start in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


def _split_hub(source: str, knob: str) -> tuple[str, str, str]:
    """Return the name of a repository, the revision, which may be empty, and what follows them."""
    parts = source.removeprefix("hf://").split("/", 2)
    if len(parts) < 3:
        raise ConfigError(f"{knob} is {source!r}; a hub source is hf://org/name@commit/glob-of-files")
    name, _, revision = f"{parts[0]}/{parts[1]}".replace("%2F", "/").partition("@")
    return name, revision, parts[2]


@contextlib.contextmanager
def open_text(file: SourceFile, ahead: int = AHEAD_BYTES) -> Iterator[BinaryIO]:
    """Open a file for reading at any place; of one on the hub or S3 no more is fetched than is read, but for `ahead`.

    Raises:
        RunError: it is no longer what was pinned; on S3 said by whatever read meets the change.
        OSError: it cannot be read.
    """
    if file.uri.startswith("hf://"):
        with _hub_explained(file), io.BufferedReader(_open_on_hub(file), ahead) as stream:
            yield stream
    elif file.uri.startswith("s3://"):
        bucket, _, name = file.uri.removeprefix("s3://").partition("/")
        etag = file.content.split(":")[1]
        with io.BufferedReader(s3_bucket(bucket).open(name, etag, file.bytes), ahead) as stream:
            yield stream
    else:
        status = Path(file.uri).stat()
        if (status.st_size, status.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise RunError(f"data: {file.uri} changed after the plan was made. Give the command again.")
        with open(file.uri, "rb") as stream:
            yield stream


def _open_on_hub(file: SourceFile) -> Any:
    from huggingface_hub import HfFileSystem

    name, commit, path = _split_hub(file.uri, "data")
    hub: Any = HfFileSystem()
    return hub.open(f"datasets/{name}@{commit}/{path}", "rb", cache_type="none")


@contextlib.contextmanager
def _hub_explained(file: SourceFile) -> Iterator[None]:
    """Turn what the hub's HTTP client raises into OSError."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HTTPError as error:
        raise OSError(f"{file.uri} cannot be read: {error}") from error


@lru_cache(maxsize=4)
def s3_bucket(name: str) -> Bucket:
    """Return a bucket by its name."""
    from pipeline.store.s3 import Bucket

    return Bucket(name, "")
