"""Score the champion, a packed model, on the very test rows that a challenger was scored on, beside the challenger's
teacher; it stands beside the line.

`documents.json` has each document of the test split in its order: {"tokens": [...], "champion": [...], "challenger":
[...], "fresh": [...]}, nats of both and whether the champion's own test split lacks it (null: its rows are not in this
store any more). Where the task measures rows, `rows.json` has {"champion": {"accuracy": [...]}, "challenger": {...}}.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, RunError
from pipeline.package.manifest import read_manifest
from pipeline.package.package import load
from pipeline.package.pull import from_store, pull
from pipeline.stages.scorer import score_splits, scoring_recipe
from pipeline.stages.stage import PinnedRun, Stage, Step, StepJob, always
from pipeline.store.records import Contest, Evaluation, Teacher, Tokens
from pipeline.store.shards import open_shard, read_tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def against(digest: str, package_uri: str, tokens_key: str) -> Stage[Contest]:
    """Return the stage for one champion: the digest of its frozen tensors, where its package lies, and the key of the
    tokens that it was trained and scored on ("": not known)."""

    def recipe(run: PinnedRun) -> dict[str, Any]:
        return {**scoring_recipe(run), "champion": digest, "champions_tokens": tokens_key}

    return Stage(
        Contest,
        always(Tokens, Teacher, Evaluation),
        recipe,
        run,
        locations=lambda run: {"package_uri": package_uri},
        unit="parts",
    )


def run(step: Step) -> Contest:
    """Score the champion, and find out which documents are fresh."""
    digest, evaluation = step.recipe["champion"], step.input(Evaluation)
    scored = score_splits(step, digest[:16], champion_of, ("test",)).student["test"]
    fresh = step.engine.task(partial(_fresh, step.job), step.dir)
    theirs = evaluation.read_json(Evaluation.DOCUMENTS)
    if theirs["tokens"] != scored.tokens:
        raise RunError("Champion and challenger were not scored on the same documents; nothing was decided.")
    documents = {"tokens": scored.tokens, "champion": scored.nats, "challenger": theirs["student"], "fresh": fresh}
    kept = {Contest.DOCUMENTS: step.dir.write(Contest.DOCUMENTS, json.dumps(documents).encode())}
    if scored.of_rows:
        rows = {"champion": scored.of_rows, "challenger": evaluation.read_json(Evaluation.ROWS)["student"]}
        kept[Contest.ROWS] = step.dir.write(Contest.ROWS, json.dumps(rows).encode())
    return Contest(
        **step.identity(),
        files=kept,
        champion=scored.metrics(),
        challenger=evaluation.record.student,
        fresh=None if fresh is None else sum(fresh),
        documents=len(scored.tokens),
    )


def champion_of(job: StepJob) -> PreTrainedModel:
    """Return the packed model, every byte checked. Raises RunError if it is not there, or another."""
    uri, digest = job.locations["package_uri"], job.recipe["champion"]
    with tempfile.TemporaryDirectory(dir=job.dir.scratch_dir()) as scratch:
        folder = Path(scratch) / "package"
        try:
            pull(from_store(uri), folder, uri)
        except ConfigError as error:
            raise RunError(f"The champion's package cannot be read: {error}") from error
        if read_manifest(folder)["digest"] != digest:
            raise RunError(f"The package at {uri} is not the champion that is registered: the digests differ.")
        return load(folder)


def _fresh(job: StepJob) -> list[bool] | None:
    """Tell of each document of the test split whether the champion's lacks it; None: its rows are not there."""
    tokens, key = job.input(Tokens), job.recipe["champions_tokens"]
    place = replace(job.dir, stage=Tokens.stage, key=key, fence=None)
    record = place.record(Tokens) if key else None
    if record is None:
        return None
    known = set(document_digests(job, FinishedStep(record, place)))
    return [digest not in known for digest in document_digests(job, tokens)]


def document_digests(job: StepJob, tokens: FinishedStep[Tokens]) -> Iterator[bytes]:
    """Yield a hash of the token ids of each document of the test split, in the order in which scores have them."""
    end = job.task.document_end(read_tokenizer(tokens.folder()))
    document, begun = hashlib.sha256(), False
    for shard in tokens.record.splits["test"].shards:
        for row, length in zip(*read_tokens(open_shard(tokens.dir, shard)), strict=True):
            if end is None:
                yield hashlib.sha256(row.tobytes()).digest()
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
