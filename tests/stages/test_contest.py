"""Who meets on which documents: told apart as they are scored, and the same whatever else a row holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.data import TaskSettings
from pipeline.errors import RunError
from pipeline.stages.contest import document_digests, has_rows, known_to
from pipeline.stages.stage import StepJob
from pipeline.store.records import Evaluation, SplitName, Tokens
from pipeline.tasks import task_of
from pipeline.tasks.next_utterance import NextUtterance
from pipeline.tasks.summarization import Summarization
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import Ran

WORDS = [f"{a}{b}" for a in "bdkl" for b in "aeio"]


def test_documents_are_told_apart_as_they_are_scored(finished: Ran) -> None:
    tokens, scored = finished.outcome.finished(Tokens), finished.outcome.finished(Evaluation)
    splits: tuple[SplitName, ...] = ("test", "train")
    digests = {split: [*document_digests(task_of(tokens.record.recipe), tokens, split)] for split in splits}
    assert len(digests["test"]) == len(scored.read_json(Evaluation.DOCUMENTS)["tokens"]) > 5
    assert len(digests["train"]) == tokens.record.splits["train"].documents
    assert {*digests["test"]}.isdisjoint(digests["train"])
    assert has_rows(tokens, "test")


def test_of_whom_nothing_is_known_may_not_be_met(finished: Ran) -> None:
    step = finished.plan.step(Evaluation)
    job = StepJob({"champions_tokens": "0" * 32}, finished.outcome.steps, step.dir, finished.plan.config.resources, {})
    with pytest.raises(RunError, match=r"which documents trained the champion: its rows at .* are gone"):
        known_to(job)
    own = replace(job, recipe={"champions_tokens": finished.record("tokenize").key})
    known = known_to(own)
    assert known.fresh == [False] * len(known.before)
    assert known.gone == 0
    assert known.before == [False] * len(known.before)  # of a split that is drawn nobody is asked


@pytest.mark.parametrize("turns", [1, 4, 30])
def test_a_reply_is_known_again_beside_other_candidates(turns: int) -> None:
    words = train_bpe(WORDS * 20, 300, NextUtterance.special_tokens)
    settings = TaskSettings(name="next_utterance", block_length=24, candidates=3, train_candidates=2)
    task, said = NextUtterance(settings), " ".join(WORDS[:turns]).split()
    short, long = [["x", word] for word in WORDS[:3]], [["y", " ".join(WORDS)] for _ in range(3)]
    long = [[name, f"{text} {number}"] for number, (name, text) in enumerate(long)]
    known = set()
    for split, pool in (("train", short), ("train", long), ("test", short), ("test", long)):
        ids, lengths, _ = task.encode(iter([([*said, "the reply"],)]), words, split, pool, "document")
        known.add(task.known_by(ids[-1], lengths[-1]).tobytes())
    assert len(known) == 1
    ids, lengths, _ = task.encode(iter([([*said, "another reply"],)]), words, "test", short, "document")
    assert task.known_by(ids[-1], lengths[-1]).tobytes() not in known


def test_a_source_is_known_again_with_another_summary() -> None:
    words = train_bpe(WORDS * 20, 300, Summarization.special_tokens)
    task = Summarization(TaskSettings(name="summarization", source_length=12, target_length=8))
    documents = [("ba be", "bi"), ("ba be", "bo bo"), ("ba be bi", "bi")]
    ids, lengths, _ = task.encode(iter(documents), words, "test", None, "document")
    first, second, other = (task.known_by(*row) for row in zip(ids, lengths, strict=True))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
