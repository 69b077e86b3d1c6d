"""Which text goes to which split, where some of the training source is held out or left out.

A file of rows is split by document: the content's hash, a point of 0..1, falls into one of the splits' intervals. A
txt file is one text, whose paragraphs follow from each other: it stays whole where there are enough of them, else each
gives a block to every split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

from pipeline.sources.files import SourceFile
from pipeline.sources.text import Part, byte_parts, parts
from pipeline.store.records import SPLITS, SplitName

Interval = tuple[float, float]
ALL: Interval = (0.0, 1.0)


class SplitPart(Part):
    """A part of the text, the split it goes to, and which of its documents: those whose hash, as a point of the unit
    interval, lies in low..high."""

    split: str
    index: int
    low: float
    high: float


def split_parts(recipe: dict[str, Any], locations: dict[str, Any]) -> list[SplitPart]:
    """Return every part to tokenize: of each split's own source, or of the training source, some of it held out. The
    cut depends on the contents of the files alone."""
    files = {split: [SourceFile.model_validate(file) for file in locations.get(split, ())] for split in SPLITS}
    intervals = _intervals(recipe["data"])
    places = _places(files["train"], [*intervals.values()])
    work = []
    for split in SPLITS:
        source, interval = files["train" if split in intervals else split], intervals.get(split, ALL)
        pieces = chain.from_iterable(_pieces(file, interval, places) for file in source)
        work += [
            SplitPart(**part.model_dump(), split=split, index=index, low=low, high=high)
            for index, (part, (low, high)) in enumerate(pieces)
        ]
    return work


def _intervals(data: dict[str, Any]) -> dict[SplitName, Interval]:
    """Return which piece of 0..1 each split has that is drawn from the training source: up to `sample` in all."""
    held_out: list[SplitName] = [split for split in SPLITS[1:] if data[split] is None]
    bounds = [*(i * data["holdout"] for i in range(len(held_out) + 1)), 1.0]
    intervals = zip([*held_out, SPLITS[0]], pairwise(bounds), strict=True)
    return {split: (low * data["sample"], high * data["sample"]) for split, (low, high) in intervals}


def _places(files: Sequence[SourceFile], intervals: Sequence[Interval]) -> dict[str, float]:
    """Return a point of 0..1 for each txt file, by content: its middle, where all lie end to end in the order of their
    hashes. None has one if an interval would get no file."""
    sizes = {file.content: file.bytes for file in files if file.format == "txt"}
    places, before = {}, 0
    for content in sorted(sizes, key=point):
        places[content] = (before + sizes[content] / 2) / sum(sizes.values())
        before += sizes[content]
    enough = all(any(low <= place < high for place in places.values()) for low, high in intervals)
    return places if enough else {}


def _pieces(file: SourceFile, interval: Interval, places: dict[str, float]) -> Iterator[tuple[Part, Interval]]:
    """Yield what an interval has of a file: parts, and where in 0..1 the hashes of their documents lie."""
    low, high = interval
    if file.format != "txt" or interval == ALL:
        yield from ((part, interval) for part in parts(file))
    elif places:
        yield from ((part, ALL) for part in parts(file) if low <= places[file.content] < high)
    else:  # training has the end, which may be a licence or an index, nothing to measure by
        yield from ((part, ALL) for part in byte_parts(file, int(low * file.bytes), int(high * file.bytes)))


def point(content: Any) -> float:
    """Return a text, or what JSON can hold, as a point of 0..1."""
    text = content if isinstance(content, str) else json.dumps(content)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
