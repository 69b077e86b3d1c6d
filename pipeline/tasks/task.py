"""A task: a value that says how text becomes rows, what a batch of rows asks of a model, and how it is scored.

Shared code asks the value; it never asks for the task's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.data import Evaluate, TaskSettings
from pipeline.errors import ConfigError
from pipeline.tasks.batch import Batch
from pipeline.tasks.scoring import Scores, score_tokens
from pipeline.tasks.tokenizers import END_OF_TEXT, token_bytes

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Encoded = tuple[NDArray[np.int32], NDArray[np.int32], int]  # rows of ids, their lengths, UTF-8 bytes of the text


@dataclass(frozen=True)
class Task(ABC):
    """A task on plain text with a decoder alone, unless a subclass says otherwise."""

    settings: TaskSettings = field(default_factory=TaskSettings)

    special_tokens: ClassVar[tuple[str, ...]] = (END_OF_TEXT,)  # of a tokenizer that is learned, end-of-text first
    encoder_decoder: ClassVar[bool] = False
    document: ClassVar[str] = "text"  # that gives a row, for people
    objects: ClassVar[bool] = False  # columns hold lists of objects, read as JSON
    templated: ClassVar[bool] = False  # the tokenizer's chat template writes what the model reads
    running: ClassVar[bool] = False  # documents follow each other in rows, each as far as `document_end`

    @property
    def bytes_a_row(self) -> int:
        """Return a guess at the bytes of text behind a row, for corpora not yet read."""
        return 4 * self.settings.block_length

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> Task:
        """Return the task that the recipe of a tokenize step describes."""
        return cls(TaskSettings.model_validate(recipe["task"]))

    @property
    def collects(self) -> bool:
        """Tell whether `collect` has to be asked, which reads all text once more."""
        return False

    @property
    def positions(self) -> dict[str, int]:
        """Return the positions that the model needs, by the knob that says so."""
        return {"task.block_length": self.settings.block_length}

    @property
    def row_tokens(self) -> int:
        """Return how many positions of a training row pass through the model, padding included."""
        return sum(self.positions.values())

    @property
    def states(self) -> int:
        """Return how many positions of a training row have the teacher's states cached."""
        return self.settings.block_length

    @property
    @abstractmethod
    def protocol(self) -> str:
        """Return the protocol by which a model is scored; it enters the key of the evaluation."""

    @property
    def shape(self) -> str:
        """Describe the length of rows, for people."""
        return f"block length {self.settings.block_length}"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        """Return the columns of a row of data that make a document; None: running text."""
        return None

    def compared(self, document: Any) -> Any:
        """Return what makes a document the same as one of another split."""
        return document

    def kept_together(self, document: Any) -> Any:
        """Return what decides which split a document goes to where some are held out."""
        return self.compared(document)

    def strings(self, document: Any) -> Iterable[str]:
        """Return all text of a document, for a tokenizer that is learned."""
        return (document,)

    def collect(self, documents: Iterable[Any], split: str) -> Any:
        """Return what must be known of a whole split before its rows are made, as JSON."""
        return None

    def check_model(
        self, config: PreTrainedConfig, given: Collection[str], encoder_decoders: Mapping[str, bool]
    ) -> None:
        """Raise ConfigError for another kind of model (`encoder_decoders` says it of each family), too few positions,
        or `given` settings of an architecture that the tokenizer decides."""
        if self.encoder_decoder != bool(config.is_encoder_decoder):
            needs = "an encoder and a decoder" if self.encoder_decoder else "a decoder alone"
            fitting = [name for name, has_encoder in encoder_decoders.items() if has_encoder == self.encoder_decoder]
            raise ConfigError(
                f"task.name is {self.settings.name}, which needs {needs}, and model.source is a {config.model_type} "
                f"model. Use a model of the families {', '.join(fitting)}, or another task."
            )
        for name in {"bos_token_id", "eos_token_id", *self.model_settings(None, None)}.intersection(given):
            raise ConfigError(f"model.source.{name}: the tokenizer decides it; leave it out")
        longest = getattr(config, "max_position_embeddings", None)
        for knob, length in self.positions.items():
            if longest is not None and length > longest:
                raise ConfigError(f"{knob} is {length}, and the model has {longest} positions; lower it.")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError for a tokenizer that lacks a token which the task needs."""
        _ = tokenizer  # any will do

    @abstractmethod
    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, collected: Any, unit: str
    ) -> Encoded:
        """Return rows of a part of a split. Raises ConfigError for documents that cannot become rows."""

    def tokens(self, lengths: NDArray[np.int32]) -> int:
        """Count the tokens that are not padding."""
        return int(lengths.sum())

    def shortage(self, split: str, rows: int, tokens: int) -> str | None:
        """Return what is wrong with a split that is too small, or None."""
        return None if rows else f"The {split} split holds no {self.document}. Give more data, or raise data.holdout."

    def estimated_rows(self, text_bytes: float) -> int:
        """Estimate the number of rows that so much text gives."""
        return max(1, int(text_bytes / self.bytes_a_row))

    def model_settings(self, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
        """Return settings of an untrained model that the tokenizer decides beside vocabulary and end-of-text."""
        return {}

    @abstractmethod
    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        """Return stored rows as the model sees them."""

    @abstractmethod
    def counts(self, lengths: NDArray[Any]) -> dict[str, int]:
        """Return what each loss is divided by: a function of the rows' lengths alone."""

    def scoring(self, evaluate: Evaluate) -> dict[str, Any]:
        """Return the part of the section `evaluate` that changes the scores."""
        return {}

    def document_end(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Return the token that ends a document in running rows; None: a row, of candidates the true one, is one."""
        return None

    def known_by(self, row: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the tokens by which a row that is a document, of these lengths, is the same in any split and at any
        time."""
        return row[: int(lengths)]

    def documents_in(self, row: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return what each document of such a row is known by, in the order in which scores have them."""
        return [self.known_by(row, lengths)]

    def passes(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Iterable[Batch]:
        """Return the batches that a model scores at once, from rows of ids and lengths."""
        return starmap(self.batch, rows)

    def score(
        self,
        rows: Iterable[tuple[Tensor, Tensor]],
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate,
        generated: Collection[int] | None = None,
    ) -> tuple[Scores, Scores]:
        """Score model and teacher on their device over rows of ids and lengths; scores of pieces of a text add up. A
        task that generates does so for the rows of these numbers, counted from 0; None: for all."""
        end = self.document_end(tokenizer)
        scores, reference = score_tokens(self.passes(rows), model, token_bytes(tokenizer), teacher, end)
        return scores, reference or Scores()
