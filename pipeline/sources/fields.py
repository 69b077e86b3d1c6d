"""Rows with several columns, for tasks that need more than running text: documents with summaries, conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import ConfigError
from pipeline.sources.packaged import packaged_rows
from pipeline.sources.text import Part, documents, records, refuse_missing


def rows(part: Part, columns: tuple[str, ...], objects: bool = False) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the rows of each document of a part, in order: of most documents one, of a paragraph one. A row holds the
    named columns, each a text or a list of texts; with `objects` each a text or, as JSON, what is none.

    Raises:
        ConfigError: a file without one of the columns, or in which it holds something else.
    """
    file = part.file
    if file.format == "txt":
        if len(columns) > 1:
            raise ConfigError(
                f"data: {file.uri} is plain text, which has no columns {', '.join(columns)}; give jsonl or Parquet"
            )
        yield from ([(text,)] for text in documents(part, "document", columns[0]))
        return
    if file.format == "python":
        source: Iterable[list[dict[str, Any]]] = packaged_rows(
            file.uri.removeprefix("python://"), part.start, part.stop
        )
    else:
        source = ([row] for row in records(part, columns) if row)
    for document in source:
        yield [tuple(_texts(row, column, file.uri, objects) for column in columns) for row in document]


def _texts(row: dict[str, Any], column: str, where: str, objects: bool) -> Any:
    refuse_missing((column,), [*row], where)
    value = "" if row[column] is None else row[column]
    if objects and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    texts = [value] if isinstance(value, str) else value
    try:
        for text in texts:
            text.encode()  # JSON can spell lone surrogates, which no UTF-8 holds
    except (AttributeError, TypeError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"data: the column {column!r} of a row of {where} is neither a text nor a list of texts ({error!r})"
        ) from error
    return value
