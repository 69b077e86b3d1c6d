"""Which text goes to which split, where some of the training source is held out or left out.

A file of rows is split by document: the content's hash, a point of 0..1, falls into one of the splits' intervals. A
txt file is one text, whose paragraphs follow from each other: it stays whole where every split comes near its share
that way, else each gives a block to every split.

What two splits hold all the same is counted by the hashes of their documents.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.sources.files import SourceFile
from pipeline.sources.text import Part, byte_parts, parts, read_footers
from pipeline.store.records import SPLITS, SplitName

Interval = tuple[float, float]
ALL: Interval = (0.0, 1.0)
COMPARED_BYTES = 2**28  # of the text of all splits; of more, a share of the documents stands for all
SHORTEST_LINE = 32  # shorter ones, such as headings, recur in any text
MOST_SHARED = 0.5  # of a split that is to measure


class SplitPart(Part):
    """A part of the text, the split it goes to, and which of its documents: those whose hash, as a point of the unit
    interval, lies in low..high. `share` of them are compared with those of other splits."""

    split: SplitName
    index: int
    low: float
    high: float
    share: float


def split_parts(recipe: dict[str, Any], locations: dict[str, Any]) -> list[SplitPart]:
    """Return every part to tokenize: of each split's own source, or of the training source, some of it held out. The
    cut depends on the contents of the files alone."""
    files = {split: [SourceFile.model_validate(file) for file in locations.get(split, ())] for split in SPLITS}
    read_footers(chain(*files.values()))
    intervals = _intervals(recipe["data"])
    places = _places(files["train"], [*intervals.values()])
    share = min(1.0, COMPARED_BYTES / sum(file.text_bytes for file in chain(*files.values())))
    work = []
    for split in SPLITS:
        source, interval = files["train" if split in intervals else split], intervals.get(split, ALL)
        if split != "train":
            source = [file.model_copy(update={"weight": 1.0}) for file in source]
        weighed = ((file, part) for file in source for part in _times(interval, file.weight))
        pieces = chain.from_iterable(_pieces(file, part, places) for file, part in weighed)
        work += [
            SplitPart(**dict(part), split=split, index=index, low=low, high=high, share=share)
            for index, (part, (low, high)) in enumerate(pieces)
        ]
    return work


def _intervals(data: dict[str, Any]) -> dict[SplitName, Interval]:
    """Return which piece of 0..1 each split has that is drawn from the training source: up to `sample` in all."""
    held_out: list[SplitName] = [split for split in SPLITS[1:] if data[split] is None]
    bounds = [*(i * data["holdout"] for i in range(len(held_out) + 1)), 1.0]
    intervals = zip([*held_out, SPLITS[0]], pairwise(bounds), strict=True)
    return {split: (low * data["sample"], high * data["sample"]) for split, (low, high) in intervals}


def _times(interval: Interval, weight: float) -> list[Interval]:
    """Return the interval as often as a weight says, and of it the share that is left."""
    low, high = interval
    rest = weight - int(weight)
    return [interval] * int(weight) + ([(low, low + (high - low) * rest)] if rest else [])


def _places(files: Sequence[SourceFile], intervals: Sequence[Interval]) -> dict[str, float]:
    """Return a point of 0..1 for each txt file, by content: its middle, where all lie end to end in the order of their
    hashes. None has one if an interval, or what no interval has, would get less than half its share of the bytes, or
    more than twice."""
    sizes: Counter[str] = Counter()
    for file in files:
        if file.format == "txt":
            sizes[file.content] += file.text_bytes
    total, before, places = sizes.total(), 0, {}
    for content in sorted(sizes, key=point):
        places[content] = (before + sizes[content] / 2) / total
        before += sizes[content]
    left_out = max(high for _, high in intervals)
    for low, high in [*intervals, *([(left_out, 1.0)] if left_out < 1 else ())]:
        bytes_in = sum(sizes[content] for content, place in places.items() if low <= place < high)
        if not 0.5 <= bytes_in / max(1, total) / (high - low) <= 2:
            return {}
    return places


def _pieces(file: SourceFile, interval: Interval, places: dict[str, float]) -> Iterator[tuple[Part, Interval]]:
    """Yield what an interval has of a file: parts, and where in 0..1 the hashes of their documents lie."""
    low, high = interval
    if file.format != "txt" or interval == ALL:
        yield from ((part, interval) for part in parts(file))
    elif places:
        yield from ((part, ALL) for part in (parts(file) if low <= places[file.content] < high else ()))
    else:  # training has the end, which may be a licence or an index, nothing to measure by
        if file.compression and file.unpacked is None:
            raise ConfigError(
                f"data.source: of {file.uri}, a compressed text elsewhere, no block can be held out, for its length is "
                "not known; set data.validation and data.test and leave data.sample, give it on this machine or not "
                "compressed, or give rows (.jsonl, .parquet) of which each is a document."
            )
        yield from ((part, ALL) for part in byte_parts(file, int(low * file.text_bytes), int(high * file.text_bytes)))


def point(content: Any) -> float:
    """Return a text, or what JSON can hold, as a point of 0..1."""
    return int.from_bytes(_digest(content)[:8]) / 2**64


def _digest(content: Any) -> bytes:
    return hashlib.sha256((content if isinstance(content, str) else json.dumps(content)).encode()).digest()


@dataclass
class Sketch:
    """The number of a split's documents, and hashes of the same share of each split's."""

    share: float = 1.0
    documents: int = 0
    hashes: array[int] = field(default_factory=lambda: array("Q"))  # a list takes five times as much

    def add(self, content: Any, unit: str) -> None:
        """Count a document, by what makes it the same as another."""
        if isinstance(content, str):
            content = content.strip()
            if unit == "line" and len(content) < SHORTEST_LINE:
                return
        self.documents += 1
        number = int.from_bytes(_digest(content)[8:16])  # not the bytes by which splits are drawn
        if number < self.share * 2**64:
            self.hashes.append(number)


def shared_documents(
    sketches: Mapping[SplitName, Sketch], data: dict[str, Any]
) -> dict[SplitName, dict[SplitName, int]]:
    """Return how many documents of validation and test an earlier split holds too, by its name; where a share of them
    was compared, an estimate.

    Raises:
        ConfigError: it is more than MOST_SHARED of a split that `data` gives a source of its own.
    """
    shared: dict[SplitName, dict[SplitName, int]] = {split: {} for split in SPLITS}
    for earlier, split in combinations([split for split in SPLITS if split in sketches], 2):
        sketch = sketches[split]
        held, hashes = (np.asarray(of.hashes, np.uint64) for of in (sketches[earlier], sketch))
        both = int(np.isin(hashes, held).sum())
        if both:
            count = shared[split][earlier] = round(sketch.documents * both / len(sketch.hashes))
            if data[split] is not None and both > MOST_SHARED * len(sketch.hashes):
                raise ConfigError(
                    f"data.{split}: {count:,} of its {sketch.documents:,} documents are in the {earlier} split too, "
                    f"more than {MOST_SHARED:.0%}. What a model is chosen or scored by must be new to it: give other "
                    f"text, or leave data.{split} out, which keeps data.holdout of data.source from training."
                )
    return shared
