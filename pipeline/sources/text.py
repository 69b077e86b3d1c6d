"""Text: files pinned by content, cut into parts that workers read side by side, and the documents in a part."""

from __future__ import annotations

import fnmatch
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.base import Closed
from pipeline.config.data import Data
from pipeline.errors import ConfigError, RunError
from pipeline.sources.content import ContentMemo
from pipeline.sources.packaged import PACKAGED_TEXT, packaged_count, packaged_files, packaged_texts
from pipeline.store.records import SplitName

FORMATS = {".txt": "txt", ".raw": "txt", ".tokens": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PART_BYTES = 4 * 2**20


class SourceFile(Closed):
    """One file of text: where it lies, and what it is. Only `content` and `format` enter a key."""

    uri: str
    format: str
    content: str
    bytes: int
    mtime_ns: int = 0  # of a local file, so that a later change is noticed


class Part(Closed):
    """A contiguous piece of a source file that one worker reads: bytes, row groups or documents start..stop."""

    file: SourceFile
    start: int
    stop: int


def pin_splits(section: Data, memo: ContentMemo) -> dict[SplitName, tuple[SourceFile, ...]]:
    """Pin the files of every split that has a source of its own. Raises ConfigError: as `pin_text` does."""
    sources: dict[SplitName, tuple[str, str | None]] = {
        "train": ("data.source", section.source),
        "validation": ("data.validation", section.validation),
        "test": ("data.test", section.test),
    }
    return {split: pin_text(source, knob, memo) for split, (knob, source) in sources.items() if source is not None}


def pin_text(source: str, knob: str, memo: ContentMemo) -> tuple[SourceFile, ...]:
    """Return a source's files, pinned by content. Raises ConfigError: none, empty, unknown format, no such package."""
    if source.startswith("python://"):
        files = _packaged_text(source, knob, memo)
    elif source.startswith("s3://"):
        files = _s3_text(source, knob)
    elif source.startswith("hf://"):
        files = _hub_text(source, knob)
    else:
        paths = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
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
    from pipeline.store.s3 import Bucket  # boto3, for those who read from S3

    bucket, _, pattern = source.removeprefix("s3://").partition("/")
    fixed = re.split(r"[*?\[]", pattern)[0]
    try:
        objects = Bucket(bucket, "")
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
        if fnmatch.fnmatch(name, pattern) and name in etags
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
    matching = [s for s in siblings if fnmatch.fnmatch(s.rfilename, pattern)]
    if not matching and any(s.rfilename.endswith(".py") for s in siblings):
        raise ConfigError(
            f"{knob}: {name} is a data set that is a script, and scripts are not run. Pin its Parquet conversion "
            f"(hf://{name}@refs%2Fconvert%2Fparquet/**.parquet), or download it and give local files."
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


def _split_hub(source: str, knob: str) -> tuple[str, str, str]:
    """Return the name of a repository, the revision, which may be empty, and what follows them."""
    parts = source.removeprefix("hf://").split("/", 2)
    if len(parts) < 3:
        raise ConfigError(f"{knob} is {source!r}; a hub source is hf://org/name@commit/glob-of-files")
    name, _, revision = f"{parts[0]}/{parts[1]}".replace("%2F", "/").partition("@")
    return name, revision, parts[2]


def parts(file: SourceFile) -> list[Part]:
    """Cut a file into pieces that workers read side by side; the cut depends on the content alone."""
    if file.format == "python":
        total = packaged_count(file.uri.removeprefix("python://"))
    elif file.format != "parquet":
        total = file.bytes
    elif "://" in file.uri:  # counting its row groups would fetch it here
        return [Part(file=file, start=0, stop=sys.maxsize)]
    else:
        try:
            total = pq.ParquetFile(file.uri).num_row_groups
        except pa.ArrowException as error:
            raise ConfigError(f"data: {file.uri} is not Parquet: {error}") from error
    length = -(-total // max(1, file.bytes // PART_BYTES)) if file.format in ("python", "parquet") else PART_BYTES
    return [Part(file=file, start=i, stop=min(i + length, total)) for i in range(0, total, length)]


def open_text(file: SourceFile, scratch: str) -> Path:
    """Return a local path to a source file; hub and S3 files are fetched."""
    if file.uri.startswith("hf://"):
        from huggingface_hub import hf_hub_download

        repo_id, commit, name = _split_hub(file.uri, "data")
        return Path(hf_hub_download(repo_id, name, revision=commit, repo_type="dataset"))
    if file.uri.startswith("s3://"):
        return _fetch_pinned(file, Path(scratch))
    path = Path(file.uri)
    if (path.stat().st_size, path.stat().st_mtime_ns) != (file.bytes, file.mtime_ns):
        raise RunError(f"data: {path} changed after the plan was made. Give the command again.")
    return path


def _fetch_pinned(file: SourceFile, scratch: Path) -> Path:
    """Return a copy of an S3 object in the version that was pinned."""
    from pipeline.store.s3 import Bucket  # boto3, for those who read from S3

    bucket, _, name = file.uri.removeprefix("s3://").partition("/")
    objects, pinned = Bucket(bucket, ""), file.content.split(":")[1]
    path = objects.local(name, scratch / pinned.strip('"'))
    if path.stat().st_size != file.bytes or objects.versions(name).get(name) != pinned:
        path.unlink()
        raise RunError(f"data: {file.uri} changed after the plan was made. Give the command again.")
    return path


def documents(part: Part, unit: str, text_column: str, scratch: str) -> Iterator[str]:
    """Yield the texts of a part, in order.

    With `unit: line`, every row or line is running text that ends in a newline; with `unit: document`, jsonl and
    parquet rows and the paragraphs of a txt file are documents. A text belongs to the part in which it starts.

    Raises:
        ConfigError: a file that is not UTF-8, a row without the text column.
    """
    file = part.file
    texts: Iterable[str]
    if file.format == "python":
        texts = packaged_texts(file.uri.removeprefix("python://"), part.start, part.stop)
    elif file.format == "parquet":
        texts = _parquet_rows(open_text(file, scratch), part, text_column)
    else:
        texts = _text_lines(open_text(file, scratch), part, unit, text_column)
    for text in texts:
        if unit == "line":
            yield text if text.endswith("\n") else text + "\n"
        elif text.strip():
            yield text


def _parquet_rows(path: Path, part: Part, column: str) -> Iterator[str]:
    table = pq.ParquetFile(path)
    if column not in table.schema_arrow.names:
        raise ConfigError(
            f"data.text_column is {column!r}, and {path.name} has no such column; valid: "
            + ", ".join(table.schema_arrow.names)
        )
    for group in range(part.start, min(part.stop, table.num_row_groups)):
        texts: list[Any] = table.read_row_group(group, [column]).column(column).cast(pa.string()).to_pylist()
        yield from (text or "" for text in texts)


def _text_lines(path: Path, part: Part, unit: str, column: str) -> Iterator[str]:
    paragraphs = part.file.format == "txt" and unit == "document"
    lines = lines_of(path, part, paragraphs)
    if paragraphs:
        return ("".join(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank)
    return (_json_text(line, path, column) for line in lines) if part.file.format == "jsonl" else lines


def lines_of(path: Path, part: Part, to_blank: bool) -> Iterator[str]:
    """Yield the lines of a byte range: those that start in it.

    With `to_blank` a range reaches from the first blank line that starts in it or after it to the first blank line
    at or after its end, so that ranges side by side hold each paragraph once.
    """
    with open(path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # ends the line that started before the range
            while to_blank:
                position, line = file.tell(), file.readline()
                if not line or (not line.strip() and position >= part.stop):
                    return
                if not line.strip():
                    break
        while True:
            position, line = file.tell(), file.readline()
            if not line or (position >= part.stop and not (to_blank and line.strip())):
                return
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"data: {path} is not UTF-8 near byte {position}: {error.reason}") from error


def _json_text(line: str, path: Path, column: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)[column]
        text = "" if text is None else str(text)
        text.encode()  # JSON can spell lone surrogates, which no UTF-8 holds
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data: a line of {path} is not a JSON object with the key data.text_column={column!r} ({error!r})"
        ) from error
    return text
