"""Language modelling: text as blocks of tokens, scored by perplexity."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.data import TaskSettings
from pipeline.distill.losses import valid_tokens
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import CONTRAST, DISTILLATION, NEXT_TOKEN
from pipeline.tasks.scoring import Scores, score_tokens
from pipeline.tasks.task import Encoded, Task
from pipeline.tasks.tokenizers import encoded

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOL = "blocks without overlap, stride = block length, no BOS; the first token of a block is context only"
ENCODE_CHARACTERS = 2**20  # running text is encoded in pieces of about this size, cut at line ends
LONG_CHARACTERS = 2**21  # of a text that is no longer encoded whole


@dataclass(frozen=True)
class LanguageModeling(Task):
    """A row is a block of text; only the last row of a part may be padded. `unit` is that of the data."""

    unit: str = "document"
    protocol: ClassVar[str] = PROTOCOL
    running: ClassVar[bool] = True

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> LanguageModeling:
        return cls(TaskSettings.model_validate(recipe["task"]), recipe["data"]["unit"])

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, collected: Any, unit: str
    ) -> Encoded:
        return encode(documents, tokenizer, self.settings.block_length, unit)

    def document_end(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        return tokenizer.eos_token_id if self.unit == "document" else None

    def shortage(self, split: str, rows: int, tokens: int) -> str | None:
        width = self.settings.block_length
        if tokens >= (width if split == "train" else rows + 1):
            return None
        return (
            f"The {split} split holds {tokens} tokens, shorter than one block. Give data with more text, or each split "
            f"its own by data.validation and data.test, or lower task.block_length (now {width})."
        )

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        valid = valid_tokens(lengths, ids.shape[1])
        return Batch(ids, lengths, targets=ids[:, 1:], supervised=valid[:, 1:], distilled=valid)

    def counts(self, lengths: NDArray[Any]) -> dict[str, int]:
        tokens = int(lengths.sum())
        return {NEXT_TOKEN: int((lengths - 1).clip(min=0).sum()), DISTILLATION: tokens, CONTRAST: tokens}


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_length: int, unit: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Return ids (rows, block_length), lengths (rows,), UTF-8 bytes; `unit: document` ends each text, `line` none."""
    ids = array("i")  # a list takes ten times as much
    text_bytes = 0
    for batch in _batches(texts, tokenizer, unit):
        text_bytes += sum(len(text.encode()) for text in batch)
        for tokens in _tokens(tokenizer, batch):
            ids.extend(tokens)
            if unit == "document" and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
    rows = -(-len(ids) // block_length)
    lengths = np.full(rows, block_length, np.int32)
    if rows:
        lengths[-1] = len(ids) - (rows - 1) * block_length
    ids.extend([0] * (rows * block_length - len(ids)))
    return np.asarray(ids, np.int32).reshape(rows, block_length), lengths, text_bytes


def _batches(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, unit: str) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODE_CHARACTERS:
            yield ["".join(batch)] if unit == "line" else batch
            batch, size = [], 0
    if batch:
        yield ["".join(batch)] if unit == "line" else batch


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    """Yield the tokens of each text. Those of a very long one are made piece by piece, for what a tokenizer holds of a
    text while it works is a hundred times as large."""
    if max(map(len, texts)) <= LONG_CHARACTERS:
        yield from encoded(tokenizer, texts)
        return
    for text in texts:
        yield [token for piece in _cut(text) for token in encoded(tokenizer, [piece])[0]]


def _cut(text: str) -> Iterator[str]:
    """Cut a text behind line ends, else before spaces, into pieces of at most LONG_CHARACTERS."""
    start = 0
    while len(text) - start > LONG_CHARACTERS:
        limit = start + LONG_CHARACTERS
        stop = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        stop = stop if stop > start else limit
        yield text[start:stop]
        start = stop
    yield text[start:]


def score(
    batches: Iterable[tuple[Tensor, Tensor]],
    model: PreTrainedModel,
    bytes_of: Tensor,
    teacher: PreTrainedModel | None = None,
) -> tuple[Scores, Scores | None]:
    """Score a model, and a teacher beside it, over ids (batch, length) and lengths (batch,). Sums run in fp64."""
    return score_tokens(starmap(LanguageModeling().batch, batches), model, bytes_of, teacher)
