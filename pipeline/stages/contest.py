"""Score the champion, a packed model, on the very test rows that a challenger was scored on, beside the challenger's
teacher; it stands beside the line.

They meet on the documents of the test split that neither was trained on, nor chosen by. A split that is drawn has no
others, by the hash that draws it; where one is given, documents of either's training and validation are left out.

`documents.json` has each of them in its order: {"tokens": [...], "champion": [...], "challenger": [...], "fresh":
[...], "left_out": number, "gone": number}, nats of both and whether the champion's own test split lacks it (null: its
rows are not in this store any more), and how many of that split are in it no more, such as one that was changed. Where
the task measures rows, `rows.json` has {"documents": [...], "champion": {"accuracy": [...]}, "challenger": {...}}: the
places in `documents.json` of the rows that were measured, and what was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, product
from typing import TYPE_CHECKING, Any

from pipeline.config.data import Evaluate
from pipeline.errors import ConfigError, RunError
from pipeline.package.manifest import read_manifest
from pipeline.package.pull import from_store, pull
from pipeline.stages.scorer import BATCH, score_splits, scoring_recipe
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.records import ROWS, SPLITS, Contest, Evaluation, SplitName, Teacher, Tokens
from pipeline.store.shards import Rows, open_shard, read_tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.task import Task
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def against(digest: str, package_uri: str, tokens_key: str, batch: int | None) -> Stage[Contest]:
    """Return the stage for one champion: the digest of its frozen tensors, where its package lies, the key of the
    tokens that it was trained and scored on, and the rows of a pass that it was scored in (None: any number), which is
    its own: a range of activations may span them."""

    def recipe(run: PinnedRun) -> dict[str, Any]:
        scoring = {name: value for name, value in scoring_recipe(run).items() if name != BATCH}
        own = {} if batch is None else {BATCH: batch}
        return {**scoring, **own, "champion": digest, "champions_tokens": tokens_key}

    return Stage(
        Contest,
        always(Tokens, Teacher, Evaluation),
        recipe,
        run,
        locations=lambda run: {"package_uri": package_uri},
        version=5,
        unit="parts",
    )


def run(step: Step) -> Contest:
    """Score the champion, and find out on which documents the two may meet, and which of these are fresh."""
    digest, evaluation = step.recipe["champion"], step.input(Evaluation)
    scored = score_splits(step, digest[:16], champion_of, ("test",)).student["test"]
    theirs = evaluation.read_json(Evaluation.DOCUMENTS)
    if theirs["tokens"] != scored.tokens:
        raise RunError("Champion and challenger were not scored on the same documents; nothing was decided.")
    known = step.engine.task(partial(known_to, step.job), step.dir)
    pairs = zip(known.before, scored.tokens, strict=True)
    new = [index for index, (before, _) in enumerate(pairs) if not before]
    place = {index: number for number, index in enumerate(new)}  # in documents.json
    measured = [index in place for index in known.measured] if scored.of_rows else [True]
    if not new or not any(measured):
        raise RunError(
            f"All {len(scored.tokens):,} documents of data.test trained the champion or the challenger, or chose its "
            "checkpoint, so that the two cannot meet. Give data.test documents that data.source and data.validation "
            "never had."
        )
    documents = {
        "tokens": [scored.tokens[index] for index in new],
        "champion": [scored.nats[index] for index in new],
        "challenger": [theirs["student"][index] for index in new],
        "fresh": None if known.fresh is None else [known.fresh[index] for index in new],
        "left_out": len(scored.tokens) - len(new),
        "gone": known.gone,
    }
    kept = {Contest.DOCUMENTS: step.dir.write(Contest.DOCUMENTS, json.dumps(documents).encode())}
    if scored.of_rows:
        sides = {"champion": scored.of_rows, "challenger": evaluation.read_json(Evaluation.ROWS)["student"]}
        rows: dict[str, Any] = {"documents": [place[index] for index in compress(known.measured, measured)]}
        for side, of_rows in sides.items():
            rows[side] = {name: [*compress(values, measured)] for name, values in of_rows.items()}
        kept[Contest.ROWS] = step.dir.write(Contest.ROWS, json.dumps(rows).encode())
    return Contest(**step.identity(), files=kept, champion=scored.metrics(), challenger=evaluation.record.student)


def champion_of(job: StepJob) -> PreTrainedModel:
    """Return the packed model, every byte checked. Raises RunError if it is not there, or another."""
    from pipeline.package.package import load  # transformers, for those who only plan

    uri, digest = job.locations["package_uri"], job.recipe["champion"]
    with job.dir.scratch_folder() as scratch:
        folder = scratch / "package"
        try:
            pull(from_store(uri), folder, uri)
        except ConfigError as error:
            raise RunError(f"The champion's package cannot be read: {error}") from error
        if read_manifest(folder)["digest"] != digest:
            raise RunError(f"The package at {uri} is not the champion that is registered: the digests differ.")
        return load(folder)


@dataclass(frozen=True)
class Known:
    """Of each document of the test split, whether it is in the training or validation rows of champion or challenger
    and, unless the champion's rows are gone, whether its own test split lacks it; the places of those that are
    measured as rows; and how many of the champion's test split are not among them."""

    before: list[bool]
    fresh: list[bool] | None
    measured: list[int]
    gone: int


def known_to(job: StepJob) -> Known:
    """Return what is known of the documents of the test split. Raises RunError: the record of the champion's rows is
    gone, so that nobody can tell."""
    tokens = job.input(Tokens)
    place = replace(job.dir, stage=Tokens.stage, key=job.recipe["champions_tokens"], fence=None)
    record = place.record(Tokens)
    if record is None:
        raise RunError(f"Nobody can say which documents trained the champion: its rows at {place.uri} are gone.")
    champions, before, fresh, gone = FinishedStep(record, place), set[bytes](), None, 0
    digests = [*document_digests(job.task, tokens, "test")]
    if any(tokens.record.recipe["data"][split] is not None for split in SPLITS[1:]):
        for rows, split in product((tokens, champions), SPLITS[:2]):
            before.update(document_digests(job.task, rows, split))
    if has_rows(champions, "test"):
        tested = set(document_digests(job.task, champions, "test"))
        fresh, gone = [digest not in tested for digest in digests], len(tested.difference(digests))
    most = Evaluate.model_validate(job.recipe.get("evaluate", {})).generated_rows
    measured = [*range(len(digests))]
    if most is not None:
        measured = Rows(tokens.dir, tokens.record.splits["test"].shards).drawn(most)
    return Known([digest in before for digest in digests], fresh, measured, gone)


def trained_on(
    task: Task, tokens: FinishedStep[Tokens], before: FinishedStep[Tokens], split: SplitName
) -> tuple[int, int]:
    """Count the documents of a split of earlier rows that are among the training rows now, and all of them."""
    trained = set(document_digests(task, tokens, "train"))
    known = [digest in trained for digest in document_digests(task, before, split)]
    return sum(known), len(known)


def has_rows(tokens: FinishedStep[Tokens], split: SplitName) -> bool:
    """Tell whether the rows of a split are in the store; they are not read."""
    sizes = tokens.dir.sizes(ROWS)
    shards = tokens.record.splits[split].shards
    return all(sizes.get(shard.file.place(shard.name)) == shard.file.bytes for shard in shards)


def document_digests(task: Task, tokens: FinishedStep[Tokens], split: SplitName) -> Iterator[bytes]:
    """Yield a hash of the token ids of each document of a split, in the order in which scores have them."""
    end = task.document_end(read_tokenizer(tokens.folder()))
    document, begun = hashlib.sha256(), False
    for shard in tokens.record.splits[split].shards:
        for row, length in zip(*read_tokens(open_shard(tokens.dir, shard)), strict=True):
            if end is None:
                yield from (hashlib.sha256(ids.tobytes()).digest() for ids in task.documents_in(row, length))
                continue
            start = 0
            for place in (row[:length] == end).nonzero()[0].tolist():
                document.update(row[start : place + 1].tobytes())
                yield document.digest()
                document, start = hashlib.sha256(), place + 1
            document.update(row[start:length].tobytes())
            begun = start < length
    if begun:
        yield document.digest()
