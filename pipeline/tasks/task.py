"""What a task is: a value that says how text becomes rows, what a batch of rows asks of a model, and how it is scored.

Shared code asks the value; it never asks for the task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.data import Evaluate

if TYPE_CHECKING:  # which knows the batch
    from pipeline.tasks.scoring import Scores

Encoded = tuple[NDArray[np.int32], NDArray[np.int32], int]  # rows of ids, their lengths, UTF-8 bytes of the text


@dataclass(frozen=True)
class Batch:
    """Rows as the model sees them. A row may hold several sequences side by side, the reference first.

    `targets` follows `ids` by one token and may lack the last position. `supervised` says where a target is to be
    learned and scored, `distilled` where the teacher's distribution is.
    """

    ids: Tensor  # (sequences, length): what the decoder reads
    lengths: Tensor  # (sequences,): those that are not padding
    targets: Tensor  # (sequences, length or length - 1)
    supervised: Tensor  # bool, as targets
    distilled: Tensor  # bool (sequences, length)
    source_ids: Tensor | None = None  # (sequences, source length): what the encoder reads
    source_mask: Tensor | None = None  # int64, 1 where the source is not padding
    group: int = 1  # sequences of a row

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is called with."""
        if self.source_ids is None or self.source_mask is None:
            return (self.ids,)
        return self.ids, self.source_ids, self.source_mask

    def to(self, device: torch.device) -> Batch:
        return self._with(lambda tensor: tensor.to(device), self.group)

    def references(self) -> Batch:
        """The first sequence of each row alone."""
        return self._with(lambda tensor: tensor[:: self.group], 1)

    def _with(self, change: Callable[[Tensor], Tensor], group: int) -> Batch:
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed, group=group)


class Task(Protocol):
    """The three of them are in `pipeline.tasks`."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens of a tokenizer that is learned for the task, end-of-text first."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""

    @property
    def collects(self) -> bool:
        """Whether `collect` has to be asked, which reads all text once more."""

    @property
    def positions(self) -> dict[str, int]:
        """Positions that the model needs, by the knob that says so."""

    @property
    def states(self) -> int:
        """Positions of a training row whose teacher's states are cached."""

    @property
    def protocol(self) -> str:
        """How a model is scored; it enters the key of the evaluation."""

    @property
    def shape(self) -> str:
        """How long rows are, for people."""

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        """Columns of a row of data that make a document; None: running text."""

    def kept_together(self, document: Any) -> Any:
        """What decides which split a document goes to where some are held out: mostly all of it."""

    def strings(self, document: Any) -> Iterable[str]:
        """All text of a document, for a tokenizer that is learned."""

    def collect(self, documents: Iterable[Any], split: str) -> Any:
        """What must be known of a whole split before its rows are made, as JSON; mostly nothing."""

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ConfigError for one that lacks a token which the task needs."""

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, shared: Any, unit: str
    ) -> Encoded:
        """Rows of a part of a split. Raises ConfigError for documents that cannot become rows."""

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        """Tokens that are not padding."""

    def shortage(self, split: str, rows: int, tokens: int) -> str | None:
        """What is wrong with a split that is too small, or None."""

    def estimated_rows(self, text_bytes: float) -> int:
        """About how many rows so much text gives."""

    def model_settings(self, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
        """Settings of an untrained model that the tokenizer decides beside vocabulary and end-of-text."""

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        """Stored rows as the model sees them."""

    def counts(self, lengths: Tensor) -> dict[str, int]:
        """What each term of the losses is divided by: a function of the rows' lengths alone."""

    def scoring(self, evaluate: Evaluate) -> dict[str, Any]:
        """The part of the section `evaluate` that changes the scores."""

    def score(
        self,
        rows: Iterable[tuple[Tensor, Tensor]],
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate,
    ) -> tuple[Scores, Scores]:
        """A model and the teacher beside it, over rows of ids and lengths, on the device where both are. Scores of
        several pieces of a text add up."""
