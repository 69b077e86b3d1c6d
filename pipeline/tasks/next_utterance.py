"""Next utterance prediction: a plain causal language model tells the true reply of a conversation among candidates.

A row is one example: each candidate is a sequence [context, reply, end-of-text], the true one first. A candidate's
score is the mean log-probability of its reply tokens given the context (`terms`), so the model needs no head of its
own. The place of the true one cannot help: sequences do not see each other, and a tie counts as a miss.

Candidates that the data does not bring are replies of other conversations of the same split, drawn by a hash of the
example from a sample of all replies that is chosen by hash: neither workers nor the cut into parts show.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import data
from pipeline.config.data import Evaluate
from pipeline.distill.losses import valid_tokens
from pipeline.errors import ConfigError
from pipeline.tasks.losses import CANDIDATES, CONTRAST, DISTILLATION, NEXT_TOKEN, candidate_scores
from pipeline.tasks.scoring import Scores, logits_for
from pipeline.tasks.task import Batch, Encoded
from pipeline.tasks.tokenizers import END_OF_TEXT, token_bytes

PROTOCOL = (
    "accuracy, 0-1, of the highest mean log-probability of a reply's tokens, end-of-text included, a tie being a miss; "
    "token metrics over the true replies"
)
POOL = 20_000  # replies of a split that candidates are drawn from
DRAWS = 200  # tries for each candidate before the replies are said to be too few
BYTES_A_TURN = 60  # a guess, for corpora not yet read


@dataclass(frozen=True)
class NextUtterance:
    """Rows of the test split hold `candidates` sequences, those of the others `train_candidates`."""

    settings: data.Task
    given: bool = False  # whether the data brings candidates
    special_tokens = (END_OF_TEXT,)
    encoder_decoder = False

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> NextUtterance:
        return cls(data.Task.model_validate(recipe["task"]), recipe["data"].get("candidates_column") is not None)

    @property
    def collects(self) -> bool:
        return not self.given

    @property
    def positions(self) -> dict[str, int]:
        return {"task.block_length": self.settings.block_length}

    @property
    def states(self) -> int:
        return self.settings.train_candidates * self.settings.block_length

    @property
    def protocol(self) -> str:
        return f"{self.settings.candidates} candidates: {PROTOCOL}"

    @property
    def shape(self) -> str:
        return f"block length {self.settings.block_length}"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        names = data["text_column"], data.get("persona_column"), data.get("candidates_column")
        return tuple(name for name in names if name is not None)

    def kept_together(self, document: Any) -> Any:
        """Of a row that is one example, first turn and persona: others of its conversation hold its reply."""
        return [lines_of(document[0])[:1], *document[1:-1]] if self.given else document

    def strings(self, document: Any) -> Iterable[str]:
        return (turn for field in document for turn in turns_of(field))

    def collect(self, documents: Iterable[Any], split: str) -> Any:
        """A sample of the split's replies, each with its conversation: those of the lowest hash, in that order.

        Raises:
            ConfigError: there is an example whose other candidates cannot all come from other conversations.
        """
        lowest: list[tuple[int, str]] = []
        said_in: dict[str, str] = {}  # a reply of several conversations counts as said in the one of lowest hash
        for document in documents:
            conversation = identity(document)
            for reply in turns_of(document[0])[1:]:
                if reply in said_in:
                    said_in[reply] = min(said_in[reply], conversation)
                elif len(lowest) < POOL or (-_hash(reply), reply) > lowest[0]:
                    said_in[reply] = conversation
                    heapq.heappush(lowest, (-_hash(reply), reply))
                    if len(lowest) > POOL:
                        del said_in[heapq.heappop(lowest)[1]]
        pool = [[said_in[reply], reply] for _, reply in sorted(lowest, reverse=True)]
        most = max(Counter(said_in.values()).values(), default=0)  # and one more may be the true reply itself
        if len(pool) - most - 1 < self._count(split) - 1:
            raise ConfigError(too_few(pool, self._count(split), split))
        return pool

    def _count(self, split: str) -> int:
        """Candidates of a row."""
        return self.settings.candidates if split == "test" else self.settings.train_candidates

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "model.tokenizer: next_utterance needs an end-of-text token, and this tokenizer has none."
            )

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, shared: Any, unit: str
    ) -> Encoded:
        count = self._count(split)
        encoder = _Encoder(tokenizer, self.settings.block_length, count)
        text_bytes = 0
        for document in documents:
            text_bytes += sum(len(turn.encode()) for turn in self.strings(document))
            for context, replies in self._examples(document, split, shared, count):
                encoder.add(context, replies)
        return *encoder.rows(), text_bytes

    def _examples(self, document: Any, split: str, shared: Any, count: int) -> Iterator[tuple[list[str], list[str]]]:
        """Each context of a document with its candidate replies, the true one first."""
        turns, more = turns_of(document[0]), [turns_of(field) for field in document[1:]]
        if self.given:
            before, candidates = [turn for field in more[:-1] for turn in field], lines_of(document[-1])
            if not candidates or not candidates[-1].strip():
                raise ConfigError(
                    f"data.candidates_column: the last candidate of a row, the true reply, is empty (in the {split} "
                    "split); leave such rows out."
                )
            candidates = [reply for reply in candidates if reply.strip()]
            if len(candidates) < count:
                raise ConfigError(
                    f"data.candidates_column: a row of the {split} split has {len(candidates)} candidates, fewer than "
                    f"task.{'candidates' if split == 'test' else 'train_candidates'} ({count}); lower it."
                )
            yield [*before, *turns], [candidates[-1], *candidates[-count:-1]]
            return
        before = [turn for field in more for turn in field]
        for place in range(1, len(turns)):
            others = draw_others(shared, identity(document), place, turns[place], count - 1, split)
            yield [*before, *turns[:place]], [turns[place], *others]

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        return int(lengths[:, : lengths.shape[1] // 2].sum())

    def shortage(self, split: str, rows: int, tokens: int) -> str | None:
        if rows:
            return None
        return f"The {split} split holds no conversation of two turns. Give more data, or raise data.holdout."

    def estimated_rows(self, text_bytes: float) -> int:
        return max(1, int(text_bytes / BYTES_A_TURN))

    def model_settings(self, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
        return {}

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        group, width = lengths.shape[1] // 2, self.settings.block_length
        length, start = lengths[:, :group].reshape(-1), lengths[:, group:].reshape(-1)
        ids = ids.reshape(-1, width)
        before = valid_tokens(start - 1, width)  # positions that do not yet predict the reply
        distilled = valid_tokens(length - 1, width) & ~before
        return Batch(ids, length, ids[:, 1:], distilled[:, :-1], distilled, group=group)

    def counts(self, lengths: Tensor) -> dict[str, int]:
        group = lengths.shape[1] // 2
        replies = lengths[:, :group] - lengths[:, group:]
        return {
            NEXT_TOKEN: int(replies[:, 0].sum()),
            CANDIDATES: len(lengths),
            DISTILLATION: int(replies.sum()),
            CONTRAST: int(lengths[:, :group].sum()),
        }

    def scoring(self, evaluate: Evaluate) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def score(
        self,
        rows: Iterable[tuple[Tensor, Tensor]],
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate,
    ) -> tuple[Scores, Scores]:
        bytes_of = token_bytes(tokenizer).to(model.device)
        ours, theirs = Scores(), Scores()
        for ids, lengths in rows:
            few = max(1, 2 * len(ids) // lengths.shape[1])  # the batch counts sequences here
            for batch in map(self.batch, ids.split(few), lengths.split(few)):
                batch = batch.to(model.device)
                first = batch.references()
                logits, reference = logits_for(model, batch), logits_for(teacher, batch)
                ours.average({"accuracy": chosen(candidate_scores(logits, batch))}, len(first.ids))
                theirs.average({"accuracy": chosen(candidate_scores(reference, batch))}, len(first.ids))
                logits, reference = logits[:: batch.group], reference[:: batch.group]
                ours.add(logits, first, bytes_of)
                theirs.add(reference, first, bytes_of)
                ours.compare(logits, reference, first)
        return ours, theirs


def chosen(scores: Tensor) -> int:
    """How many rows of (rows, candidates) have their first score above all others."""
    return int((scores[:, :1] > scores[:, 1:]).all(1).sum())


def turns_of(field: Any) -> list[str]:
    """The turns of a conversation: a list, or a text of one turn a line; empty ones are left out."""
    return [turn for turn in lines_of(field) if turn.strip()]


def lines_of(field: Any) -> list[str]:
    return field.splitlines() if isinstance(field, str) else list(field)


def identity(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:32]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def draw_others(pool: list[list[str]], conversation: str, place: int, reply: str, count: int, split: str) -> list[str]:
    """`count` different replies of other conversations, a function of the pool and of the example alone.

    Raises:
        ConfigError: the pool has too few.
    """
    found: list[str] = []
    for number in itertools.count():
        if len(found) == count:
            return found
        if number == DRAWS * count or not pool:
            break
        other, text = pool[_hash(f"{conversation}/{place}/{number}") % len(pool)]
        if other != conversation and text != reply and text not in found:
            found.append(text)
    raise ConfigError(too_few(pool, count + 1, split))


def too_few(pool: list[list[str]], count: int, split: str) -> str:
    return (
        f"The {split} split has {len(pool)} different replies, too few for {count - 1} of other conversations. "
        f"Lower task.{'candidates' if split == 'test' else 'train_candidates'}, or give more conversations."
    )


class _Encoder:
    """Collects rows of one width; the tokens of a turn are remembered, since a reply serves in many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, count: int) -> None:
        self.tokenizer, self.width, self.count = tokenizer, width, count
        self._known: dict[str, list[int]] = {}
        self._ids: list[NDArray[np.int32]] = []
        self._lengths: list[list[int]] = []

    def add(self, context: list[str], replies: list[str]) -> None:
        """One row. A reply takes at most half of the width; the context's end fills what the longest leaves."""
        end_of_text = self.tokenizer.eos_token_id
        ends = [[*self._turn(reply)[:-1][: self.width // 2 - 1], end_of_text] for reply in replies]
        room = self.width - max(map(len, ends))
        # A reply without a context follows end-of-text, as a generated text does.
        start = [token for turn in context for token in self._turn(turn)][-room:] or [end_of_text]
        row = np.zeros((self.count, self.width), np.int32)
        for sequence, end in zip(row, ends, strict=True):
            sequence[: len(start) + len(end)] = [*start, *end]
        self._ids.append(row.reshape(-1))
        self._lengths.append([*(len(start) + len(end) for end in ends), *([len(start)] * self.count)])

    def rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if not self._ids:
            return np.zeros((0, self.count * self.width), np.int32), np.zeros((0, 2 * self.count), np.int32)
        return np.stack(self._ids), np.array(self._lengths, np.int32)

    def _turn(self, text: str) -> list[int]:
        """Tokens of a turn and end-of-text."""
        if text not in self._known:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._known[text] = [*ids, self.tokenizer.eos_token_id]
        return self._known[text]
