"""Rows of tables, one at a time from a stream, whatever the size of the file: JSON arrays, CSV and TSV, Arrow.

Own readers, and not those of `datasets`: its stream of a jsonl.gz of 100 MB takes 380 MiB of memory where this takes
none to speak of, it holds a JSON array whole, and it guesses types, so that a text "NA" is none and "001" is 1.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import ConfigError

MOST_BYTES = 2**26  # of a line, and of a document: ten times the longest of novels
JSON_CHARACTERS = 2**18  # are read at once; more for a longer element
ARROW_FILE = b"ARROW1\0\0"  # before the stream, in a file that has a footer behind it
_BETWEEN = re.compile(r"[\s,]*")

csv.field_size_limit(MOST_BYTES)


def too_long(where: str) -> ConfigError:
    """Return the error for a line or a document that no memory is to be filled with."""
    return ConfigError(
        f"data: {where} has a line or a document of more than {MOST_BYTES // 2**20} MiB; cut it into documents (in "
        ".txt by blank lines), or give running text of shorter lines with data.unit: line."
    )


def csv_rows(stream: BinaryIO, delimiter: str, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of text, by the names in its first line; quoted fields may hold line ends.

    Raises:
        ConfigError: what is not UTF-8, a quote that does not end, a row longer or shorter than the first line.
    """
    table = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        if len({*header}) < len(header):
            raise ConfigError(f"data: the first line of {where} names a column twice: {', '.join(header)}")
        for row in table:
            if row and len(row) != len(header):
                raise ConfigError(
                    f"data: the row that ends in line {table.line_num} of {where} has {len(row)} fields, and its first "
                    f"line, which names the columns, {len(header)}. Fields that hold a separator or a quote are quoted."
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        if "field limit" in str(error):
            raise too_long(where) from error
        raise ConfigError(f"data: {where} is no table near line {table.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {where} is not UTF-8 near line {table.line_num}: {error.reason}") from error


def array_rows(stream: BinaryIO, where: str) -> Iterator[Any]:
    """Yield the elements of a JSON array. Raises ConfigError: what is not JSON, or not UTF-8."""
    decode, text = json.JSONDecoder().raw_decode, io.TextIOWrapper(stream, "utf-8-sig")
    try:
        held = text.read(JSON_CHARACTERS)
        place, number = held.index("[") + 1, 0
        while True:
            place = _after_space(held, place)
            if held[place : place + 1] == "]":
                return
            try:
                element, end = decode(held, place)
            except ValueError as error:
                held, place = held[place:], 0
                more = text.read(max(len(held), JSON_CHARACTERS))  # twice as much each time, so that no cost is square
                if not more:
                    raise ConfigError(
                        f"data: {where} is a JSON array that cannot be read behind its element {number}: {error}"
                    ) from error
                if len(held) > MOST_BYTES:
                    raise too_long(where) from error
                held += more
                continue
            if end - place > MOST_BYTES:
                raise too_long(where)
            place, number = end, number + 1
            yield element
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {where} is not UTF-8: {error.reason}") from error


def _after_space(text: str, place: int) -> int:
    between = _BETWEEN.match(text, place)
    return place if between is None else between.end()


def arrow_batches(stream: BinaryIO, columns: Sequence[str], where: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file of Arrow, of either of its two forms, no other column among them. Raises ConfigError:
    it is none."""
    if stream.peek(len(ARROW_FILE)).startswith(ARROW_FILE):  # type: ignore[attr-defined]
        stream.read(len(ARROW_FILE))
    try:
        with pa.ipc.open_stream(stream) as reader:
            for batch in reader:
                yield batch.select([name for name in columns if name in batch.schema.names])
    except pa.ArrowInvalid as error:
        raise ConfigError(f"data: {where} is not Arrow: {error}") from error
