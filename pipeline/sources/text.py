"""Text: files cut into parts that workers read side by side, and the documents in a part."""

from __future__ import annotations

import codecs
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.base import Closed
from pipeline.errors import ConfigError
from pipeline.sources.compressed import skip
from pipeline.sources.files import SourceFile, open_text
from pipeline.sources.packaged import packaged_count, packaged_texts
from pipeline.sources.rows import MOST_BYTES, array_rows, arrow_batches, csv_rows, too_long

PART_BYTES = 4 * 2**20
GROUP_PARTS = 16  # at most of one row group, which each reads from its beginning
PARQUET_AHEAD_BYTES = 2**16  # a footer
PARQUET_BUFFER_BYTES = 2**20  # of a column, which may be larger than memory
FOOTERS_AT_ONCE = 16
BATCH_ROWS = 1024
BATCH_BYTES = 2**24
WHOLE = ("json", "csv", "tsv", "arrow")  # formats of which nobody can tell where a row begins but by reading all before


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
    if file.compression or file.format in WHOLE:
        return [Part(file=file, start=0, stop=sys.maxsize)]
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
    """Cut bytes start..stop of a text file into parts: of a compressed one, whose bytes come in order, one."""
    if file.compression:
        return [Part(file=file, start=start, stop=stop)]
    return _cut(file, start, stop, PART_BYTES)


def _cut(file: SourceFile, start: int, stop: int, length: int) -> list[Part]:
    return [Part(file=file, start=i, stop=min(i + length, stop)) for i in range(start, stop, max(1, length))]


def read_footers(files: Iterable[SourceFile]) -> None:
    """Read the footers of Parquet files that are to be cut, several at once. Raises ConfigError: one cannot be read."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        for _ in pool.map(row_counts, (file for file in files if file.format == "parquet" and not file.compression)):
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
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(open_text(file, PARQUET_AHEAD_BYTES))
        if file.compression:  # it is read from its end
            stored = opened.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, stored)
            stream = cast(BinaryIO, stored)
        try:
            table = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES)
        except pa.ArrowException as error:
            raise ConfigError(f"data: {file.uri} is not Parquet: {error}") from error
        yield table


def batches(table: pq.ParquetFile, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield a part's rows, no other column among them; of row groups that hold none of them nothing is read."""
    start = 0
    for group in range(table.num_row_groups):
        described = table.metadata.row_group(group)
        stop = start + described.num_rows
        at_once = max(1, min(BATCH_ROWS, BATCH_BYTES * described.num_rows // max(1, described.total_byte_size)))
        if start < part.stop and part.start < stop:
            for batch in table.iter_batches(at_once, row_groups=[group], columns=[*columns]):
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
    elif file.format == "txt":
        texts = _paragraphs(part) if unit == "document" else lines_of(part, False)
    else:
        texts = (_text(row, text_column, file) for row in records(part, (text_column,)))
    for text in texts:
        if unit == "line":
            yield text if text.endswith("\n") else text + "\n"
        elif text.strip():
            yield text


def _paragraphs(part: Part) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines_of(part, True):
        if line.strip():
            held.append(line)
            size += len(line)
            if size > MOST_BYTES:
                raise too_long(part.file.uri)
        elif held:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _text(row: dict[str, Any], column: str, file: SourceFile) -> str:
    """Return the text of a row: numbers are as they are written, and nothing is an empty one."""
    refuse_missing((column,), [*row], file.uri)
    value = row[column]
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value)
        try:
            text.encode()  # JSON can spell lone surrogates, which no UTF-8 holds
            return text
        except UnicodeEncodeError as error:
            value = error
    kind = value if isinstance(value, Exception) else f"a {type(value).__name__}"
    raise ConfigError(f"data: data.text_column={column!r} of a row of {file.uri} is no text, but {kind}")


def records(part: Part, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of a file that has columns, of which some formats give no others than these.

    Raises:
        ConfigError: what is not of its format, a column that no row has, a line without an end.
    """
    file = part.file
    if file.format == "jsonl":
        yield from map(partial(_json_object, file=file), filter(str.strip, lines_of(part, False)))
    elif file.format == "parquet":
        with open_parquet(file) as table:
            refuse_missing(columns, table.schema_arrow.names, file.uri)
            yield from _of_batches(batches(table, part, columns), file)
    else:
        with open_text(file) as stream:
            if file.format == "json":
                yield from map(partial(_object, file=file), array_rows(stream, file.uri))
            elif file.format == "arrow":
                yield from _of_batches(arrow_batches(stream, columns, file.uri), file)
            else:
                yield from csv_rows(stream, "\t" if file.format == "tsv" else ",", file.uri)


def _of_batches(read: Iterable[pa.RecordBatch], file: SourceFile) -> Iterator[dict[str, Any]]:
    try:
        for batch in read:
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: a text of {file.uri} is not UTF-8: {error.reason}") from error


def refuse_missing(columns: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for a column that is not among those known."""
    missing = sorted({*columns} - {*known})
    if missing:
        raise ConfigError(
            f"data: {where} has no column {missing[0]!r}; valid: {', '.join(map(str, known))}. Set "
            "data.text_column, summary_column, messages_column, candidates_column or persona_column to one of them."
        )


def lines_of(part: Part, to_blank: bool) -> Iterator[str]:
    """Yield the lines of a byte range: those that start in it.

    With `to_blank` a range reaches from the first blank line that starts in it or after it to the first blank line
    at or after its end, so that ranges side by side hold each paragraph once.
    """
    with open_text(part.file) as file:
        position = part.start - 1 if part.start else 0
        if part.file.compression:
            skip(file, position)
        else:
            file.seek(position)

        def next_line() -> bytes:
            line = file.readline(MOST_BYTES + 1)
            if len(line) > MOST_BYTES:
                raise too_long(part.file.uri)
            return line

        if part.start:
            position += len(next_line())  # ends the line that started before the range
            while to_blank:
                start, line = position, next_line()
                position += len(line)
                if not line or (not line.strip() and start >= part.stop):
                    return
                if not line.strip():
                    break
        while True:
            start, line = position, next_line()
            position += len(line)
            if not line or (start >= part.stop and not (to_blank and line.strip())):
                return
            if start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.endswith(b"\r\n"):
                line = line[:-2] + b"\n"
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"data: {part.file.uri} is not UTF-8 near byte {start}: {error.reason}") from error


def _json_object(line: str, file: SourceFile) -> dict[str, Any]:
    try:
        return _object(json.loads(line), file)
    except ValueError as error:
        raise ConfigError(f"data: a line of {file.uri} is not a JSON object ({error!r})") from error


def _object(value: Any, file: SourceFile) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"data: a row of {file.uri} is not a JSON object, but a {type(value).__name__}")
    return value
