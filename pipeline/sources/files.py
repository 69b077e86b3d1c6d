"""Files of text: found and pinned by content when the plan is made, opened where they are read."""

from __future__ import annotations

import codecs
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
from pipeline.sources.cloud import CLOUDS, cloud_files, open_cloud
from pipeline.sources.compressed import COMPRESSIONS, ZIP, count_bytes, members, unpacking
from pipeline.sources.content import ContentMemo
from pipeline.sources.packaged import PACKAGED_TEXT, packaged_files, packaged_texts
from pipeline.sources.sets import files_of_set, folder_files
from pipeline.store.records import SPLITS, SplitName

if TYPE_CHECKING:  # boto3, for those who read from S3
    from pipeline.store.s3 import Bucket

FORMATS = {
    ".txt": "txt",
    ".raw": "txt",
    ".tokens": "txt",
    ".jsonl": "jsonl",
    ".json": "jsonl",  # or, where it begins with a bracket, an array
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
AHEAD_BYTES = 2**20
SNIFFED_BYTES = 256
UNPACKED_TIMES = 3.5  # as large as what is compressed: a guess


class SourceFile(Closed):
    """One file of text: where it lies, and what it is. Only `content` and `format` enter a key."""

    uri: str
    format: str
    content: str
    bytes: int
    mtime_ns: int = 0  # of a local file, so that a later change is noticed
    compression: str = ""  # one of COMPRESSIONS
    member: str = ""  # of a .zip
    weight: float = 1.0  # of a source of training text
    unpacked: int | None = None  # bytes; None: not compressed, or not known

    @property
    def text_bytes(self) -> int:
        """Return the bytes of the text, of a compressed one perhaps a guess."""
        if self.unpacked is not None:
            return self.unpacked
        return int(self.bytes * UNPACKED_TIMES) if self.compression else self.bytes


def pin_splits(section: Data, memo: ContentMemo) -> dict[SplitName, tuple[SourceFile, ...]]:
    """Pin the files of every split that has a source of its own.

    Raises:
        ConfigError: as `pin_text` does; a file that is in two of them; running text that is to be split by document.
    """
    knobs = {"train": "data.source", "validation": "data.validation", "test": "data.test"}
    pinned = {
        split: tuple(
            file.model_copy(update={"weight": source.weight})
            for source in section.sources(split)
            for file in pin_text(source.path, knobs[split], memo, source.config, source.split)
        )
        for split in SPLITS
        if section.sources(split)
    }
    rows = next((file for file in pinned["train"] if file.format != "txt"), None)
    if section.unit == "line" and rows is not None and (len(pinned) < len(knobs) or section.sample < 1):
        raise ConfigError(
            f"data.unit: line takes the rows of {rows.uri} as running text, which has no documents to hold out or "
            "sample; set data.validation and data.test and leave data.sample, use unit: document, or give .txt files"
        )
    first_with: dict[str, tuple[str, str]] = {}
    for split, files in pinned.items():
        knob = knobs[split]
        for file in files:
            other, uri = first_with.setdefault(file.content, (knob, file.uri))
            if other != knob:
                raise ConfigError(
                    f"{other} and {knob} hold the same file: {uri} and {file.uri} are equal, byte for byte. Take it "
                    f"out of one of them, or leave {knob} out, which keeps data.holdout of data.source from training."
                )
    return pinned


def pin_text(
    source: str, knob: str, memo: ContentMemo, config: str | None = None, split: str | None = None
) -> tuple[SourceFile, ...]:
    """Return a source's files, pinned by content; `config` and `split` are of a data set, a folder or a repository.

    Raises:
        ConfigError: none, an empty one, an unknown format, no such package, config or split, or a user or password in
            its URI.
    """
    try:
        taking_none(source)
    except ValueError as error:
        raise ConfigError(f"{knob}: {error}.") from error
    on_hub, is_folder = source.startswith("hf://"), "://" not in source and Path(source).is_dir()
    if (config is not None or split is not None) and not (on_hub and source.count("/") == 3) and not is_folder:
        raise ConfigError(
            f"{knob} is {source!r}, which names files and no data set: `config` and `split` are of "
            "hf://org/name@commit or a folder; leave them out."
        )
    if source.startswith("python://"):
        files = _packaged_text(source, knob, memo)
    elif source.startswith("s3://"):
        files = _s3_text(source, knob)
    elif on_hub:
        files = _hub_text(source, knob, config, split)
    elif source.startswith(CLOUDS):
        files = [
            SourceFile(uri=uri, **format_of(uri, knob), content=content, bytes=size)
            for uri, content, size in cloud_files(source, knob, _matches)
        ]
    else:
        if is_folder:
            paths = folder_files(Path(source), config, split, knob)
        else:
            matching = map(Path, glob.glob(source, recursive=True, include_hidden=True))
            paths = sorted({path for path in matching if path.is_file()})
        files = [
            SourceFile(
                uri=str(path.resolve()),
                **format_of(path.name, knob),
                content=memo.sha256(path),
                bytes=path.stat().st_size,
                mtime_ns=path.stat().st_mtime_ns,
            )
            for path in paths
        ]
    if not files:
        raise ConfigError(
            f"{knob} is {source!r}, and no file matches it. Valid: a path or glob of {', '.join(FORMATS)} files, "
            "a folder of a data set, s3://bucket/glob, gs:// or az:// alike, hf://org/name@commit, also with /glob, or "
            "python://" + " or python://".join(PACKAGED_TEXT)
        )
    for file in files:
        if file.bytes == 0:
            raise ConfigError(f"{knob}: the file {file.uri} is empty.")
    try:
        return tuple(looked_at for file in files for looked_at in _looked_into(file, knob, memo))
    except OSError as error:
        raise ConfigError(f"{knob}: {source!r} cannot be read: {error}") from error


def format_of(name: str, knob: str) -> dict[str, Any]:
    """Return the format that a name ends in, and the compression behind it; of a .zip what it holds has formats."""
    path, compression = Path(name), ""
    if path.suffix in COMPRESSIONS:
        path, compression = path.with_suffix(""), path.suffix
    if path.suffix not in FORMATS and compression != ZIP:
        raise ConfigError(
            f"{knob}: {name} is of no known format; valid endings: {', '.join(FORMATS)}, each alone or before "
            f"{', '.join(COMPRESSIONS)}"
        )
    return {"format": FORMATS.get(path.suffix, ""), "compression": compression}


def _looked_into(file: SourceFile, knob: str, memo: ContentMemo) -> list[SourceFile]:
    """Return a file as what its first bytes say that it is; of a .zip, the files in it."""
    if file.compression == ZIP and not file.member:
        with open_stored(file) as stream:
            inside = members(stream, file.uri)
        if not inside:
            raise ConfigError(f"{knob}: there is no file in {file.uri}.")
        return [
            looked_at
            for name, size in inside.items()
            for looked_at in _looked_into(
                file.model_copy(
                    update={
                        "format": _member_format(name, file.uri, knob),
                        "content": f"{file.content}/{name}",
                        "member": name,
                        "unpacked": size,
                    }
                ),
                knob,
                memo,
            )
        ]
    if file.format == "jsonl" and Path(file.member or file.uri.removesuffix(file.compression)).suffix == ".json":
        with open_text(file, SNIFFED_BYTES) as stream:
            array = stream.read(SNIFFED_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        return [file.model_copy(update={"format": "json"}) if array else file]
    if file.format == "txt" and file.compression and file.mtime_ns and file.unpacked is None:
        # Blocks of a text are cut by its bytes, and those of a compressed one are told by nothing but a reading of it.
        size = memo.remembered(Path(file.uri), "unpacked", partial(_unpacked_bytes, file))
        return [file.model_copy(update={"unpacked": int(size)})]
    return [file]


def _member_format(name: str, uri: str, knob: str) -> str:
    try:
        return FORMATS[Path(name).suffix]
    except KeyError:
        raise ConfigError(
            f"{knob}: {name} in {uri} is of no known format; valid endings: {', '.join(FORMATS)}"
        ) from None


def _unpacked_bytes(file: SourceFile) -> str:
    with open_text(file) as stream:
        return str(count_bytes(stream))


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
            **format_of(name, knob),
            content=f"etag:{etags[name]}:{sizes[name]}",
            bytes=sizes[name],
        )
        for name in sorted(sizes)
        if _matches(name, pattern) and name in etags
    ]


def _hub_text(source: str, knob: str, config: str | None, split: str | None) -> list[SourceFile]:
    """Return the files of a dataset repository, `hf://org/name@revision/glob`, or without a glob those of a split of
    the data set, pinned by commit."""
    from huggingface_hub import HfApi

    # Of whichever HTTP client this version of the hub uses; not all of its errors are the hub's own.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name, revision, pattern = _split_hub(source, knob)
    try:
        info = HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
        siblings = info.siblings or []
        wanted = None if pattern else _names_in(f"{name}@{info.sha}", files_of_set(name, info.sha, config, split, knob))
    except (HTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{knob}: the hub does not give {source!r}: {error}") from error
    matching = [s for s in siblings if (_matches(s.rfilename, pattern) if wanted is None else s.rfilename in wanted)]
    if not matching and any(s.rfilename.endswith(".py") for s in siblings):
        raise ConfigError(
            f"{knob}: {name} is a data set that is a script, and scripts are not run. Pin its Parquet conversion "
            f"(hf://{name}@refs%2Fconvert%2Fparquet/**/*.parquet), or download it and give local files."
        )
    return [
        SourceFile(
            uri=f"hf://{name}@{info.sha}/{s.rfilename}",
            **format_of(s.rfilename, knob),
            content=f"hub:{name}@{info.sha}/{s.rfilename}",
            bytes=s.size or 1,
        )
        for s in sorted(matching, key=lambda s: s.rfilename)
    ]


def _names_in(repository: str, urls: list[str]) -> set[str]:
    return {url.removeprefix(f"hf://datasets/{repository}/") for url in urls}


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
    if len(parts) < 2:
        raise ConfigError(
            f"{knob} is {source!r}; a hub source is hf://org/name@commit, a data set, or hf://org/name@commit/glob"
        )
    name, _, revision = f"{parts[0]}/{parts[1]}".replace("%2F", "/").partition("@")
    return name, revision, "".join(parts[2:])


@contextlib.contextmanager
def open_text(file: SourceFile, ahead: int = AHEAD_BYTES) -> Iterator[BinaryIO]:
    """Open a file for reading, at any place unless it is compressed. Raises as `open_stored` and `unpacking` do."""
    with open_stored(file, ahead) as stored:
        if not file.compression:
            yield stored
            return
        with unpacking(stored, file.compression, file.member, file.uri) as stream:
            yield stream


@contextlib.contextmanager
def open_stored(file: SourceFile, ahead: int = AHEAD_BYTES) -> Iterator[BinaryIO]:
    """Open a file as it is stored; of one on the hub or S3 no more is fetched than is read, but for `ahead`.

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
    elif file.uri.startswith(CLOUDS):
        with open_cloud(file.uri, file.content, ahead) as stream:
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
