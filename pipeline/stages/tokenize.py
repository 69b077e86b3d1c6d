"""Text to fixed-width rows of token ids: parts of the text side by side, Parquet shards, the tokenizer beside them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.sources.fields import rows
from pipeline.sources.models import model_folder
from pipeline.sources.text import Part, SourceFile, documents, parts
from pipeline.stages.stage import Step
from pipeline.store.records import Shard, Split, SplitName, StoredFile, Tokens
from pipeline.store.shards import commit_shard, committed_shard, rows_per_shard, write_tokens
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.tokenizers import read_tokenizer, train_bpe

VERSION = 1
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class SplitPart(Part):
    """A part of the text, the split it goes to, and which of its documents: those whose content hash, as a point of
    the unit interval, lies in low..high."""

    split: str
    index: int
    low: float
    high: float


def run(step: Step) -> Tokens:
    recipe, place = step.recipe, step.place
    work = split_parts(recipe, step.locations)
    tokenizer_files = _tokenizer(step, [part for part in work if part.split == "train"])
    task = task_of(recipe)
    shared = {}
    if task.collects:
        shared = step.engine.task(_collect, {"place": place, "recipe": recipe, "work": work}, place)
    settings = {"place": place, "files": tokenizer_files, "recipe": recipe, "shared": shared}
    found = {split: Split() for split in SPLITS}
    entries = [json.loads(line) for line in step.engine.shards(TokenizePart, settings, work, step.advance, gpus=0)]
    for entry in sorted(entries, key=lambda entry: (entry["split"], entry["index"])):
        split = found[entry["split"]]
        found[entry["split"]] = Split(
            shards=(*split.shards, *(Shard.model_validate(shard) for shard in entry["shards"])),
            text_bytes=split.text_bytes + entry["text_bytes"],
        )
    for name, split in found.items():
        shortage = task.shortage(name, split.rows, split.tokens)
        if shortage is not None:
            raise ConfigError(shortage)
    tokenizer = read_tokenizer(place.folder(tokenizer_files, Tokens.FOLDER))
    return Tokens(
        **step.identity(),
        files=tokenizer_files,
        block_length=recipe["task"]["block_length"],
        vocabulary=len(tokenizer),
        end_of_text=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id if task.encoder_decoder else None,
        splits=found,
    )


def split_parts(recipe: dict[str, Any], locations: dict[str, Any]) -> list[SplitPart]:
    """Every part to tokenize: of each split's own source, or of the training source with documents held out."""
    data = recipe["data"]
    held_out = [split for split in ("validation", "test") if data[split] is None]
    bounds = {split: (i * data["holdout"], (i + 1) * data["holdout"]) for i, split in enumerate(held_out)}
    bounds["train"] = (len(held_out) * data["holdout"], 1.0)
    work = []
    for split in SPLITS:
        source = "train" if split in held_out else split
        low, high = bounds.get(split, (0.0, 1.0))
        share = data["sample"] if source == "train" else 1.0
        files = [SourceFile.model_validate(file) for file in locations[source]]
        pieces = [part for file in files for part in parts(file)]
        work += [
            SplitPart(**piece.model_dump(), split=split, index=index, low=low * share, high=high * share)
            for index, piece in enumerate(pieces)
        ]
    return work


def documents_of(part: SplitPart, recipe: dict[str, Any], scratch: str) -> Iterator[Any]:
    """The part's documents that belong to its split: texts, or tuples of the columns that the task reads."""
    data, task = recipe["data"], task_of(recipe)
    columns = task.columns(data)
    found: Iterator[Any] = (
        documents(part, data["unit"], data["text_column"], scratch) if columns is None else rows(part, columns, scratch)
    )
    for document in found:
        if (part.low, part.high) == (0.0, 1.0) or part.low <= _position(task.kept_together(document)) < part.high:
            yield document


def _position(document: Any) -> float:
    text = document if isinstance(document, str) else json.dumps(document)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _tokenizer(step: Step, training: Sequence[SplitPart]) -> dict[str, StoredFile]:
    """The tokenizer's files in the store; they are made once."""
    done = step.place.record(Tokens)
    if done is not None:
        return done.files
    settings = {"place": step.place, "recipe": step.recipe, "training": training}
    return step.engine.task(_make_tokenizer, settings | {"location": step.locations.get("tokenizer")}, step.place)


def _make_tokenizer(
    place: StepDir, recipe: dict[str, Any], training: Sequence[SplitPart], location: dict[str, Any] | None
) -> dict[str, StoredFile]:
    """Read from its folder, or learned from the training split."""
    if location is None:
        task, scratch = task_of(recipe), str(place.scratch_dir())
        found = (document for part in training for document in documents_of(part, recipe, scratch))
        stream = (text for document in found for text in task.strings(document))
        tokenizer = train_bpe(stream, recipe["tokenizer"]["train_bpe"], task.special_tokens)
    else:
        tokenizer = read_tokenizer(model_folder(location), location["gguf_file"])
    with tempfile.TemporaryDirectory(dir=place.scratch_dir()) as folder:
        tokenizer.save_pretrained(folder)
        return {
            Tokens.FOLDER + path.name: place.upload(Tokens.FOLDER + path.name, path) for path in Path(folder).iterdir()
        }


def _collect(place: StepDir, recipe: dict[str, Any], work: Sequence[SplitPart]) -> dict[str, StoredFile]:
    """What the task must know of each split before its rows are made, one JSON file a split."""
    task, scratch = task_of(recipe), str(place.scratch_dir())
    files: dict[str, StoredFile] = {}
    for split in SPLITS:
        parts_of = [part for part in work if part.split == split]
        found = (document for part in parts_of for document in documents_of(part, recipe, scratch))
        known = task.collect(found, split)
        files[split] = place.write(f"attempt/{split}.json", json.dumps(known).encode())
    return files


class TokenizePart:
    """Tokenizes parts on one worker; a part whose shards are all committed is not done again."""

    def __init__(
        self, place: StepDir, files: dict[str, StoredFile], recipe: dict[str, Any], shared: dict[str, StoredFile]
    ) -> None:
        self.place, self.recipe, self.shared, self.task = place, recipe, shared, task_of(recipe)
        self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(place.folder(files, Tokens.FOLDER))

    def __call__(self, part: SplitPart) -> str:
        name = f"parts/{part.split}-{part.index:05d}.json"
        done = self._done(name)
        if done is None:
            done = self._tokenize(part)
            self.place.write(name, json.dumps(done).encode())
        return json.dumps(done)

    def _done(self, name: str) -> dict[str, Any] | None:
        try:
            entry: dict[str, Any] = json.loads(self.place.read(name))
        except FileNotFoundError:
            return None
        sound = all(committed_shard(self.place, shard["name"]) for shard in entry["shards"])
        return entry if sound else None

    def _tokenize(self, part: SplitPart) -> dict[str, Any]:
        found = documents_of(part, self.recipe, str(self.place.scratch_dir()))
        ids, lengths, text_bytes = self.task.encode(
            found, self.tokenizer, part.split, self._shared(part.split), self.recipe["data"]["unit"]
        )
        step = rows_per_shard(ids.shape[1])
        shards = []
        for number, start in enumerate(range(0, len(ids), step)):
            rows, valid = ids[start : start + step], lengths[start : start + step]
            shard = commit_shard(
                self.place,
                f"rows/{part.split}-{part.index:05d}-{number:05d}.parquet",
                len(rows),
                self.task.tokens(valid),
                partial(write_tokens, ids=rows, lengths=valid),
            )
            shards.append(shard.model_dump())
        return {"split": part.split, "index": part.index, "shards": shards, "text_bytes": text_bytes}

    def _shared(self, split: str) -> Any:
        if split not in self.shared:
            return None
        return json.loads(self.place.local(f"attempt/{split}.json", self.shared[split]).read_text())
