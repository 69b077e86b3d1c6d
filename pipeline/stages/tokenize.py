"""Text to fixed-width rows of token ids: parts of the text side by side, Parquet shards, the tokenizer beside them."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any

from pipeline.config.base import Closed
from pipeline.errors import ConfigError
from pipeline.sources.fields import rows
from pipeline.sources.files import SourceFile
from pipeline.sources.models import model_folder
from pipeline.sources.splits import ALL, Sketch, SplitPart, point, shared_documents, split_parts
from pipeline.sources.text import documents
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always, upload_folder
from pipeline.store.pieces import Pieces
from pipeline.store.records import ROWS, SPLITS, Overlap, Shard, Split, SplitName, StoredFile, Tokens
from pipeline.store.shards import is_sound, rows_per_shard, store_shard, write_tokens
from pipeline.store.step_store import StepDir
from pipeline.tasks import task_of
from pipeline.tasks.task import Encoded
from pipeline.tasks.tokenizers import read_tokenizer, save_tokenizer, train_bpe

SMALL_TEXT_BYTES = 2**20  # up to here a corpus is counted exactly before anything starts
PIECE_CHARACTERS = 2**23  # twice the bytes of a part, so that most parts are one piece
COMPARED_BEFORE_BYTES = 2**26  # so much is read before anything starts where a split has a source of its own


def locations(run: PinnedRun) -> dict[str, Any]:
    """Return where the files of each split lie, and the tokenizer unless it is learned."""
    return _text(run) | ({"tokenizer": run.tokenizer.location()} if run.tokenizer is not None else {})


def _text(run: PinnedRun) -> dict[str, Any]:
    return {split: [file.model_dump() for file in files] for split, files in run.text.items()}


def check(run: PinnedRun, step_dir: StepDir, tokens: Tokens | None) -> Overlap | None:
    """Look at the text before any worker starts: the columns of files on this machine, what splits share of text on
    this machine, and all of a small corpus. Returns what they share, if all of it was compared.

    Raises:
        ConfigError: a column that is not there, a split that cannot fill what it must, or one that is another's.
    """
    task, recipe, tokenizer = run.task, run.tokens_recipe, run.tokenizer
    work, columns = split_parts(recipe, locations(run)), task.columns(recipe["data"])
    for part in work if columns is not None else ():
        if part.start == 0 and _is_here(part.file):
            next(rows(part, columns or (), task.objects), None)
    small = {split for split, files in run.text.items() if sum(file.text_bytes for file in files) <= SMALL_TEXT_BYTES}
    with_own = any(recipe["data"][split] is not None for split in SPLITS[1:])
    described = json.dumps([recipe, _text(run)])
    overlap = _compared_before(described, max(SMALL_TEXT_BYTES, COMPARED_BEFORE_BYTES if with_own else 0))
    texts = {
        split: list(_split_documents(split, work, recipe))
        for split in SPLITS
        if (split if run.text.get(split) else "train") in small
    }
    if not texts:
        return overlap
    if tokenizer is None:
        known = texts.get("train") or chain.from_iterable(texts.values())
        strings = (text for document in known for text in task.strings(document))
        words = train_bpe(strings, recipe["tokenizer"]["train_bpe"], task.special_tokens)
    else:
        words = read_tokenizer(tokenizer.folder, tokenizer.gguf_file)
    for split, read in texts.items():
        collected = task.collect(read, split) if task.collects else None
        _, lengths, _ = task.encode(iter(read), words, split, collected, recipe["data"]["unit"])
        _refuse_shortage(recipe, split, len(lengths), task.tokens(lengths))
    return overlap


def _refuse_shortage(recipe: dict[str, Any], split: str, rows: int, tokens: int) -> None:
    """Raise ConfigError for a split that is too small."""
    data, task = recipe["data"], task_of(recipe)
    shortage = task.shortage(split, rows, tokens)
    if shortage is None:
        return
    if not tokens and data["unit"] == "document" and any(file["format"] == "txt" for file in data["train"]):
        of_lines = "" if task.columns(data) else ", or set data.unit: line, which cuts at any line"
        shortage += (
            f" With data.unit: document a .txt file is cut at blank lines alone, and one that has none is a single "
            f"document, whole in one split: put a blank line between documents{of_lines}."
        )
    raise ConfigError(shortage)


def _is_here(file: SourceFile) -> bool:
    return "://" not in file.uri or file.format == "python"


@lru_cache(maxsize=16)  # all trials of a sweep ask
def _compared_before(described: str, budget: float) -> Overlap | None:
    """Return what splits share of a text given as JSON, [recipe, its files by split]; None if more than `budget` bytes
    were to be read for that, or text that is large and elsewhere.

    As far as the bytes go, splits with a source of their own are compared with training text.

    Raises:
        ConfigError: one of them is mostly another's.
    """
    recipe, places = json.loads(described)
    work, data, complete = split_parts(recipe, places), recipe["data"], True
    pieces = Counter((part.split, part.file.uri) for part in work)
    sketches: dict[SplitName, Sketch] = {}
    for split in sorted(SPLITS, key=lambda split: (split != "train") * (1 if data[split] is None else -1)):
        sketch, whole = Sketch(), True
        for part in (part for part in work if part.split == split):
            budget -= part.file.text_bytes / pieces[split, part.file.uri]
            whole = budget >= 0 and (_is_here(part.file) or part.file.text_bytes <= SMALL_TEXT_BYTES)
            if not whole:
                break
            for _ in _watched(documents_of(part, recipe), sketch, recipe):
                pass
        complete = complete and whole
        if whole or split == "train":
            sketches[split] = sketch
    shared = shared_documents(sketches, data)
    documents = {split: sketch.documents for split, sketch in sketches.items()}
    return Overlap(shared=shared, documents=documents) if complete else None


def run(step: Step) -> Tokens:
    """Make the tokenizer, then the rows of every part on a pool of actors."""
    task, work = task_of(step.recipe), split_parts(step.recipe, step.locations)
    record = step.dir.record(Tokens)  # there when a shard is repaired; the tokenizer is made once
    files = record.files if record is not None else step.engine.task(partial(make_tokenizer, step.job, work), step.dir)
    collected = step.engine.task(partial(_collect, step.job, work), step.dir) if task.collects else {}
    lines = step.engine.shards(partial(TokenizePart, step.job, files, collected), work, step.advance, 0, step.dir)
    splits, sketches = {split: Split() for split in SPLITS}, {split: Sketch() for split in SPLITS}
    for part in sorted(map(TokenizedPart.model_validate_json, lines), key=lambda part: (part.split, part.index)):
        split, sketch = splits[part.split], sketches[part.split]
        shards, text_bytes = (*split.shards, *part.shards), split.text_bytes + part.text_bytes
        splits[part.split] = Split(shards=shards, text_bytes=text_bytes)
        sketch.documents += part.documents
        sketch.hashes.frombytes(b64decode(part.hashes))
    for name, shared in shared_documents(sketches, step.recipe["data"]).items():
        counted = {"documents": sketches[name].documents, "shared": shared}
        split = splits[name] = splits[name].model_copy(update=counted)
        _refuse_shortage(step.recipe, name, split.rows, split.tokens)
    tokenizer = read_tokenizer(step.dir.folder(files, Tokens.FOLDER))
    return Tokens(
        **step.identity(),
        files=files,
        vocabulary=len(tokenizer),
        end_of_text=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id if task.encoder_decoder else None,
        splits=splits,
        compared=work[0].share,
    )


STAGE = Stage(
    Tokens,
    always(),
    lambda run: run.tokens_recipe,
    run,
    locations,
    check,
    version=4,
    shared=True,
    repairs=True,
    unit="parts",
)


def documents_of(part: SplitPart, recipe: dict[str, Any]) -> Iterator[Any]:
    """Yield the part's documents that belong to its split: texts, or tuples of the columns that the task reads."""
    data, task = recipe["data"], task_of(recipe)
    columns = task.columns(data)
    read: Iterator[list[Any]] = (
        ([text] for text in documents(part, data["unit"], data["text_column"]))
        if columns is None
        else rows(part, columns, task.objects)
    )
    for document in read:  # all rows of one document go where its first one goes
        if (part.low, part.high) == ALL or part.low <= point(task.kept_together(document[0])) < part.high:
            yield from document


def _watched(documents: Iterable[Any], sketch: Sketch, recipe: dict[str, Any]) -> Iterator[Any]:
    """Yield documents, each added to a sketch."""
    task, unit = task_of(recipe), recipe["data"]["unit"]
    for document in documents:
        sketch.add(task.compared(document), unit)
        yield document


def _split_documents(split: str, work: Sequence[SplitPart], recipe: dict[str, Any]) -> Iterator[Any]:
    return (document for part in work if part.split == split for document in documents_of(part, recipe))


def make_tokenizer(job: StepJob, work: Sequence[SplitPart]) -> dict[str, StoredFile]:
    """Store the tokenizer, read from its folder or learned from the training split."""
    location = job.locations.get("tokenizer")
    if location is None:
        task, read = task_of(job.recipe), _split_documents("train", work, job.recipe)
        strings = (text for document in read for text in task.strings(document))
        tokenizer = train_bpe(strings, job.recipe["tokenizer"]["train_bpe"], task.special_tokens)
    else:
        tokenizer = read_tokenizer(model_folder(location), location["gguf_file"])
    with job.dir.scratch_folder() as folder:
        save_tokenizer(tokenizer, folder)
        save_tokenizer(read_tokenizer(folder), folder)  # as it is written ever after: the same content
        return upload_folder(job.dir, folder, Tokens.FOLDER)


def _collect(job: StepJob, work: Sequence[SplitPart]) -> dict[str, StoredFile]:
    """Store what the task must know of each split before its rows are made, one JSON file a split."""
    task = task_of(job.recipe)

    def collected(split: SplitName) -> bytes:
        return json.dumps(task.collect(_split_documents(split, work, job.recipe), split)).encode()

    return {split: job.dir.write(f"attempt/{split}.json", collected(split)) for split in SPLITS}


class TokenizedPart(Closed):
    """The shards of a part, how much text it had, and hashes of those of its documents that are compared."""

    split: SplitName
    index: int
    shards: tuple[Shard, ...]
    text_bytes: int
    documents: int
    hashes: str  # base64, for the driver holds those of all parts


class TokenizePart:
    """Tokenizes parts on one worker; a part whose shards are all there and sound is not done again. `collected` has a
    file a split where the task collects."""

    def __init__(self, job: StepJob, tokenizer: dict[str, StoredFile], collected: dict[str, StoredFile]) -> None:
        self.dir, self.recipe, self.task, self.collected = job.dir, job.recipe, task_of(job.recipe), collected
        self.tokenizer = read_tokenizer(job.dir.folder(tokenizer, Tokens.FOLDER))
        self.made = Pieces(job.dir, "parts/")

    def __call__(self, part: SplitPart) -> str:
        name = f"{part.split}-{part.index:05d}"
        made: TokenizedPart | None = self.made.get(name, TokenizedPart.model_validate)
        if made is None or not all(is_sound(self.dir, shard) for shard in made.shards):
            made = self._tokenize(part)
            self.made.put(name, made.model_dump(mode="json"))
        return made.model_dump_json()

    def _tokenize(self, part: SplitPart) -> TokenizedPart:
        sketch = Sketch(part.share)
        read = _watched(documents_of(part, self.recipe), sketch, self.recipe)
        stored, collected = self.collected.get(part.split), None
        if stored is not None:
            collected = json.loads(self.dir.local(f"attempt/{part.split}.json", stored).read_text())
        shards: list[Shard] = []
        text_bytes = 0
        for piece in self._pieces(read):
            ids, lengths, piece_bytes = self._encode(piece, part.split, collected)
            text_bytes += piece_bytes
            per_shard = rows_per_shard(ids.shape[1])
            for start in range(0, len(ids), per_shard):
                rows, valid = ids[start : start + per_shard], lengths[start : start + per_shard]
                name = f"{ROWS}{part.split}-{part.index:05d}-{len(shards):05d}.parquet"
                write = partial(write_tokens, ids=rows, lengths=valid)
                shards.append(store_shard(self.dir, name, len(rows), self.task.tokens(valid), write))
        return TokenizedPart(
            split=part.split,
            index=part.index,
            shards=tuple(shards),
            text_bytes=text_bytes,
            documents=sketch.documents,
            hashes=b64encode(sketch.hashes.tobytes()).decode(),
        )

    def _pieces(self, documents: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """Yield the documents in pieces of about PIECE_CHARACTERS, of which each has rows of its own: a part may be a
        file of any size, and its rows would not fit in memory."""
        for first in documents:
            left = PIECE_CHARACTERS

            def piece(first: Any = first) -> Iterator[Any]:
                nonlocal left
                for document in chain((first,), documents):
                    left -= sum(map(len, self.task.strings(document)))
                    yield document
                    if left <= 0:
                        return

            yield piece()
            if left > 0:
                return

    def _encode(self, documents: Iterator[Any], split: SplitName, collected: Any) -> Encoded:
        return self.task.encode(documents, self.tokenizer, split, collected, self.recipe["data"]["unit"])
