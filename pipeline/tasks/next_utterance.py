"""Next utterance prediction: a plain causal language model tells the true reply of a conversation among candidates.

A row is one example: each candidate is a sequence [context, reply, end-of-text], the true one first, whose position
cannot help: sequences do not see each other, and a tie counts as a miss. `losses` says how a candidate is scored.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.data import TaskSettings
from pipeline.distill.losses import valid_tokens
from pipeline.errors import ConfigError
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import CANDIDATES, CONTRAST, DISTILLATION, NEXT_TOKEN
from pipeline.tasks.task import Encoded, Task
from pipeline.tasks.tokenizers import encoded

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedTokenizerBase

PROTOCOL = (
    "accuracy, 0-1, of the highest mean log-probability of a reply's tokens, end-of-text included, a tie being a miss; "
    "token metrics over the true replies"
)
POOL = 20_000  # replies of a split that candidates are drawn from
DRAWS = 200  # tries for each candidate before the replies are said to be too few


@dataclass(frozen=True)
class NextUtterance(Task):
    """Candidates side by side: a row holds `candidates` sequences, one of the training split `train_candidates`."""

    given: bool = False  # whether the data brings candidates
    document: ClassVar[str] = "conversation of two turns"
    bytes_a_row: ClassVar[int] = 60  # a guess at those of a turn, for corpora not yet read

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> NextUtterance:
        return cls(TaskSettings.model_validate(recipe["task"]), recipe["data"].get("candidates_column") is not None)

    @property
    def collects(self) -> bool:
        return not self.given

    @property
    def row_tokens(self) -> int:
        return self.settings.train_candidates * self.settings.block_length

    @property
    def states(self) -> int:
        return self.row_tokens

    @property
    def protocol(self) -> str:
        return f"{self.settings.candidates} candidates: {PROTOCOL}"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        names = data["text_column"], data.get("persona_column"), data.get("candidates_column")
        return tuple(name for name in names if name is not None)

    def kept_together(self, document: Any) -> Any:
        """Return, of a row that is one example, first turn and persona: others of its conversation hold its reply."""
        return [lines_of(document[0])[:1], *document[1:-1]] if self.given else document

    def strings(self, document: Any) -> Iterable[str]:
        return (turn for field in document for turn in turns_of(field))

    def collect(self, documents: Iterable[Any], split: str) -> Any:
        """Return a sample of the split's replies, each with its conversation: those of the lowest hash, in that order.
        Neither workers nor the cut into parts show.

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
        return self.settings.train_candidates if split == "train" else self.settings.candidates

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "model.tokenizer: next_utterance needs an end-of-text token, and this tokenizer has none."
            )

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, collected: Any, unit: str
    ) -> Encoded:
        count = self._count(split)
        encoder = _Encoder(tokenizer, self.settings.block_length, count)
        text_bytes = 0
        for document in documents:
            text_bytes += sum(len(turn.encode()) for turn in self.strings(document))
            for context, replies in self._examples(document, split, collected, count):
                encoder.add(context, replies)
        return *encoder.rows(), text_bytes

    def _examples(self, document: Any, split: str, collected: Any, count: int) -> Iterator[tuple[list[str], list[str]]]:
        """Yield each context of a document with its candidate replies, the true one first."""
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
                    f"{knob_of(split)} ({count}); lower it."
                )
            yield [*before, *turns], [candidates[-1], *candidates[-count:-1]]
            return
        before = [turn for field in more for turn in field]
        for place in range(1, len(turns)):
            others = draw_others(collected, identity(document), place, turns[place], count - 1, split)
            yield [*before, *turns[:place]], [turns[place], *others]

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        return int(lengths[:, : lengths.shape[1] // 2].sum())

    def known_by(self, row: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the true reply and before it what any candidates leave of its context, to which a split's others are
        drawn."""
        width, (end, start) = self.settings.block_length, lengths[:: len(lengths) // 2].tolist()
        return row[max(0, start - (width - width // 2)) : end]

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        group, width = lengths.shape[1] // 2, self.settings.block_length
        length, start = lengths[:, :group].reshape(-1), lengths[:, group:].reshape(-1)
        ids = ids.reshape(-1, width)
        before = valid_tokens(start - 1, width)  # positions that do not yet predict the reply
        distilled = valid_tokens(length - 1, width) & ~before
        return Batch(ids, length, ids[:, 1:], distilled[:, :-1], distilled, group=group)

    def counts(self, lengths: NDArray[Any]) -> dict[str, int]:
        group = lengths.shape[1] // 2
        replies = lengths[:, :group] - lengths[:, group:]
        counts = {NEXT_TOKEN: int(replies[:, 0].sum()), CANDIDATES: len(lengths), DISTILLATION: int(replies.sum())}
        return {**counts, CONTRAST: int(lengths[:, :group].sum())}

    def passes(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        for ids, lengths in rows:
            few = max(1, 2 * len(ids) // lengths.shape[1])  # the batch counts sequences here
            yield from map(self.batch, ids.split(few), lengths.split(few))


def turns_of(field: Any) -> list[str]:
    """Return the turns of a conversation: a list, or a text of one turn a line; empty ones are left out."""
    return [turn for turn in lines_of(field) if turn.strip()]


def lines_of(field: Any) -> list[str]:
    """Return the turns of a conversation as `turns_of` does, empty ones among them."""
    return field.splitlines() if isinstance(field, str) else list(field)


def identity(document: Any) -> str:
    """Return 32 hex digits that tell a document from others."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:32]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def draw_others(pool: list[list[str]], conversation: str, place: int, reply: str, count: int, split: str) -> list[str]:
    """Draw replies of other conversations, by pool and example alone. Raises ConfigError if there are too few."""
    drawn: list[str] = []
    for number in range(DRAWS * count if pool else 0):
        other, text = pool[_hash(f"{conversation}/{place}/{number}") % len(pool)]
        if other != conversation and text != reply and text not in drawn:
            drawn.append(text)
            if len(drawn) == count:
                return drawn
    raise ConfigError(too_few(pool, count + 1, split))


def too_few(pool: list[list[str]], count: int, split: str) -> str:
    """Return the message for a split whose pool has too few replies for rows of `count` candidates."""
    return (
        f"The {split} split has {len(pool)} different replies, too few for {count - 1} of other conversations. "
        f"Lower {knob_of(split)}, or give more conversations."
    )


def knob_of(split: str) -> str:
    """Return the setting that says how many candidates a row of a split has."""
    return "task.train_candidates" if split == "train" else "task.candidates"


class _Encoder:
    """Collects rows of one width; the tokens of a turn are remembered, since a reply serves in many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, count: int) -> None:
        self.tokenizer, self.width, self.count = tokenizer, width, count
        self._known: dict[str, list[int]] = {}
        self._ids: list[NDArray[np.int32]] = []
        self._lengths: list[list[int]] = []

    def add(self, context: list[str], replies: list[str]) -> None:
        """Add one row. A reply takes at most half of the width; the context's end fills what the longest leaves."""
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
        """Return ids (rows, count * width), and (rows, 2 * count) ends of the sequences, then starts of replies."""
        ids, lengths = np.array(self._ids, np.int32), np.array(self._lengths, np.int32)
        return ids.reshape(-1, self.count * self.width), lengths.reshape(-1, 2 * self.count)

    def _turn(self, text: str) -> list[int]:
        """Return the tokens of a turn and end-of-text."""
        if text not in self._known:
            self._known[text] = [*encoded(self.tokenizer, [text])[0], self.tokenizer.eos_token_id]
        return self._known[text]
