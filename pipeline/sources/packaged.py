"""Text that installs as a Python package: `python://NAME`, and `python://NAME/SPLIT` where the package has splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.sources.content import package_folder

PACKAGED_TEXT = {
    "chitchat": ("chitchat_dataset", "chitchat-dataset"),
    "pydoc": ("pydoc_data", None),
    "aclsum": ("aclsum", "aclsum"),
}
FILES = {
    "chitchat": "dataset.json",
    "pydoc": "topics.py",
    "aclsum/train": "dataset/train.jsonl",
    "aclsum/validation": "dataset/val.jsonl",
    "aclsum/test": "dataset/test.jsonl",
}


def packaged_files(source: str) -> dict[str, Path] | None:
    """Return the files of a package or split by name, or None. Raises ConfigError if the package is not installed."""
    package = PACKAGED_TEXT.get(source.partition("/")[0])
    names = [name for name in FILES if name == source or name.startswith(f"{source}/")]
    return None if package is None or not names else {name: package_folder(*package) / FILES[name] for name in names}


def packaged_count(name: str) -> int:
    """Count the documents of a file: topics, conversations, papers."""
    return len(_items(name))


def packaged_texts(name: str, start: int = 0, stop: int = sys.maxsize) -> list[str]:
    """Return documents start..stop of a file as running text."""
    package = name.partition("/")[0]
    items = _items(name)[start:stop]
    if package == "chitchat":
        return ["\n".join(_turns(item)) for item in items]
    return [_paper(item) for item in items] if package == "aclsum" else items


def packaged_rows(name: str, start: int, stop: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each of the documents start..stop: a conversation's `text` is its list of turns; a paper gives
    a row for each aspect, whose `text` begins with the aspect and has its `summary`."""
    package = name.partition("/")[0]
    for item in _items(name)[start:stop]:
        if package == "chitchat":
            yield [{"text": _turns(item)}]
        elif package == "aclsum":
            aspects = sorted(item["summary"].items())
            yield [{"text": f"{aspect}: {_paper(item)}", "summary": summary} for aspect, summary in aspects]
        else:
            yield [{"text": item}]


@lru_cache(maxsize=1)  # every part of a file asks for it
def _items(name: str) -> list[Any]:
    if name == "pydoc":
        from pydoc_data.topics import topics

        return [topics[topic] for topic in sorted(topics)]
    folder = package_folder(*PACKAGED_TEXT[name.partition("/")[0]])
    content = (folder / FILES[name]).read_text(encoding="utf-8")
    return list(json.loads(content).values()) if name == "chitchat" else [*map(json.loads, content.splitlines())]


def _turns(conversation: dict[str, Any]) -> list[str]:
    return [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]


def _paper(paper: dict[str, Any]) -> str:
    sentences = paper["sentences"]
    parts = [" ".join(sentences[section]) for section in ("abstract", "introduction", "conclusion")]
    return "\n".join([paper["title"], *parts])
