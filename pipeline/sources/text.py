"""Text: files cut into parts that workers read side by side, and the documents in a part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.base import Closed
from pipeline.errors import ConfigError
from pipeline.sources.files import SourceFile, open_text
from pipeline.sources.packaged import packaged_count, packaged_texts

PART_BYTES = 4 * 2**20
GROUP_PARTS = 16  # at most of one row group, which each reads from its beginning
PARQUET_AHEAD_BYTES = 2**16  # a footer
PARQUET_BUFFER_BYTES = 2**20  # of a column, which may be larger than memory
FOOTERS_AT_ONCE = 16
BATCH_ROWS = 1024


class Part(Closed):
    """A contiguous piece of a source file that one worker reads: bytes, rows (Parquet) or documents start..stop."""

    file: SourceFile
    start: int
    stop: int


def parts(file: SourceFile) -> list[Part]:
    """Cut a file into pieces that workers read side by side; the cut depends on the content alone.

    Raises:
        ConfigError: the footer of a Parquet file, which says how many rows it has, cannot be read.
    """
    pieces = max(1, file.bytes // PART_BYTES)
    if file.format == "parquet":
        total, groups = row_counts(file)
        pieces = min(pieces, max(1, groups) * GROUP_PARTS)
    elif file.format == "python":
        total = packaged_count(file.uri.removeprefix("python://"))
    else:
        return byte_parts(file, 0, file.bytes)
    return _cut(file, 0, total, -(-total // pieces))


def byte_parts(file: SourceFile, start: int, stop: int) -> list[Part]:
    """Cut bytes start..stop of a text file into parts."""
    return _cut(file, start, stop, PART_BYTES)


def _cut(file: SourceFile, start: int, stop: int, length: int) -> list[Part]:
    return [Part(file=file, start=i, stop=min(i + length, stop)) for i in range(start, stop, max(1, length))]


def read_footers(files: Iterable[SourceFile]) -> None:
    """Read the footers of Parquet files that are to be cut, several at once. Raises ConfigError: one cannot be read."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        for _ in pool.map(row_counts, (file for file in files if file.format == "parquet")):
            pass


@cache  # a plan asks several times
def row_counts(file: SourceFile) -> tuple[int, int]:
    """Return how many rows and row groups a Parquet file has. Raises ConfigError: it cannot be read."""
    try:
        with open_parquet(file) as table:
            return int(table.metadata.num_rows), int(table.num_row_groups)
    except OSError as error:
        raise ConfigError(f"data: {file.uri} cannot be read: {error}") from error


@contextlib.contextmanager
def open_parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, of which no more is read than its footer. Raises ConfigError: it is not Parquet."""
    with open_text(file, PARQUET_AHEAD_BYTES) as stream:
        try:
            table = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES)
        except pa.ArrowException as error:
            raise ConfigError(f"data: {file.uri} is not Parquet: {error}") from error
        yield table


def batches(table: pq.ParquetFile, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield a part's rows, no other column among them; of row groups that hold none of them nothing is read."""
    start = 0
    for group in range(table.num_row_groups):
        stop = start + table.metadata.row_group(group).num_rows
        if start < part.stop and part.start < stop:
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[*columns]):
                skipped = min(len(batch), max(0, part.start - start))
                kept = batch.slice(skipped, max(0, part.stop - start - skipped))
                if len(kept):
                    yield kept
                start += len(batch)
                if start >= part.stop:
                    return
        start = stop


def documents(part: Part, unit: str, text_column: str) -> Iterator[str]:
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
    else:
        texts = _parquet_rows(part, text_column) if file.format == "parquet" else _text_lines(part, unit, text_column)
    for text in texts:
        if unit == "line":
            yield text if text.endswith("\n") else text + "\n"
        elif text.strip():
            yield text


def _parquet_rows(part: Part, column: str) -> Iterator[str]:
    with open_parquet(part.file) as table:
        if column not in table.schema_arrow.names:
            raise ConfigError(
                f"data.text_column is {column!r}, and {part.file.uri} has no such column; valid: "
                + ", ".join(table.schema_arrow.names)
            )
        for batch in batches(table, part, [column]):
            yield from (text or "" for text in batch.column(0).cast(pa.string()).to_pylist())


def _text_lines(part: Part, unit: str, column: str) -> Iterator[str]:
    paragraphs = part.file.format == "txt" and unit == "document"
    lines = lines_of(part, paragraphs)
    if paragraphs:
        return ("".join(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank)
    return (_json_text(line, part, column) for line in lines) if part.file.format == "jsonl" else lines


def lines_of(part: Part, to_blank: bool) -> Iterator[str]:
    """Yield the lines of a byte range: those that start in it.

    With `to_blank` a range reaches from the first blank line that starts in it or after it to the first blank line
    at or after its end, so that ranges side by side hold each paragraph once.
    """
    with open_text(part.file) as file:
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
                raise ConfigError(f"data: {part.file.uri} is not UTF-8 near byte {position}: {error.reason}") from error


def _json_text(line: str, part: Part, column: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)[column]
        text = "" if text is None else str(text)
        text.encode()  # JSON can spell lone surrogates, which no UTF-8 holds
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data: a line of {part.file.uri} is not a JSON object with the key data.text_column={column!r} ({error!r})"
        ) from error
    return text
