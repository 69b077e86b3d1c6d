"""Language modelling: text as blocks of tokens, scored by perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import data
from pipeline.config.data import Evaluate
from pipeline.distill.losses import valid_tokens
from pipeline.tasks.losses import CONTRAST, DISTILLATION, NEXT_TOKEN
from pipeline.tasks.scoring import Scores, score_tokens
from pipeline.tasks.task import Batch, Encoded
from pipeline.tasks.tokenizers import END_OF_TEXT, token_bytes

PROTOCOL = "blocks without overlap, stride = block length, no BOS; the first token of a block is context only"
ENCODE_CHARACTERS = 2**20  # running text is encoded in pieces of about this size, cut at line ends
BYTES_A_TOKEN = 4  # a guess, for corpora not yet tokenized


@dataclass(frozen=True)
class LanguageModeling:
    """A row is a block of text; only the last row of a part may be padded."""

    settings: data.Task = field(default_factory=data.Task)
    special_tokens = (END_OF_TEXT,)
    encoder_decoder = False
    collects = False

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> LanguageModeling:
        return cls(data.Task.model_validate(recipe["task"]))

    @property
    def positions(self) -> dict[str, int]:
        return {"task.block_length": self.settings.block_length}

    @property
    def states(self) -> int:
        return self.settings.block_length

    @property
    def protocol(self) -> str:
        return PROTOCOL

    @property
    def shape(self) -> str:
        return f"block length {self.settings.block_length}"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        return None

    def kept_together(self, document: Any) -> Any:
        return document

    def strings(self, document: Any) -> Iterable[str]:
        return (document,)

    def collect(self, documents: Iterable[Any], split: str) -> Any:
        return None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        return None

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, shared: Any, unit: str
    ) -> Encoded:
        return encode(documents, tokenizer, self.settings.block_length, unit)

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        return int(lengths.sum())

    def shortage(self, split: str, rows: int, tokens: int) -> str | None:
        width = self.settings.block_length
        if tokens >= (width if split == "train" else rows + 1):
            return None
        return (
            f"The {split} split holds {tokens} tokens, shorter than one block. Give data with more text, or lower "
            f"task.block_length (now {width})."
        )

    def estimated_rows(self, text_bytes: float) -> int:
        return max(1, int(text_bytes / BYTES_A_TOKEN / self.settings.block_length))

    def model_settings(self, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
        return {}

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        valid = valid_tokens(lengths, ids.shape[1])
        return Batch(ids, lengths, targets=ids[:, 1:], supervised=valid[:, 1:], distilled=valid)

    def counts(self, lengths: Tensor) -> dict[str, int]:
        tokens = int(lengths.sum())
        return {NEXT_TOKEN: int((lengths - 1).clamp(min=0).sum()), DISTILLATION: tokens, CONTRAST: tokens}

    def scoring(self, evaluate: Evaluate) -> dict[str, Any]:
        return {}

    def score(
        self,
        rows: Iterable[tuple[Tensor, Tensor]],
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate,
    ) -> tuple[Scores, Scores]:
        scores, reference = score(rows, model, token_bytes(tokenizer), teacher)
        return scores, reference or Scores()


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_length: int, unit: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Rows of token ids (rows, block_length), their lengths (rows,), and the UTF-8 bytes of the texts.

    `unit: document` puts end-of-text after each text; `unit: line` encodes it as running text. Only the last row may
    be padded.
    """
    ids: list[int] = []
    text_bytes = 0
    for batch in _batches(texts, tokenizer, unit):
        text_bytes += sum(len(text.encode()) for text in batch)
        for encoded in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            ids += encoded
            if unit == "document" and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
    rows = -(-len(ids) // block_length)
    lengths = np.full(rows, block_length, np.int32)
    if rows:
        lengths[-1] = len(ids) - (rows - 1) * block_length
    padded = np.zeros(rows * block_length, np.int32)
    padded[: len(ids)] = ids
    return padded.reshape(rows, block_length), lengths, text_bytes


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


def score(
    batches: Iterable[tuple[Tensor, Tensor]],
    model: PreTrainedModel,
    bytes_of: Tensor,
    teacher: PreTrainedModel | None = None,
) -> tuple[Scores, Scores | None]:
    """Score a model, and a teacher beside it, over batches of ids (batch, length) and lengths (batch,).

    The model's kl_nats is KL(teacher || model) over all valid tokens. Sums run in fp64.
    """
    task = LanguageModeling()
    return score_tokens((task.batch(ids, lengths) for ids, lengths in batches), model, bytes_of, teacher)
