"""Abstractive summarization by an encoder and a decoder, scored by ROUGE of what beam search writes.

A row is a source and a target side by side: the source as the tokenizer encodes it, cut to source_length; the target
[start, summary as the tokenizer encodes it, end], cut to target_length. Position i of the decoder predicts token i + 1
of the target, as transformers' shift_tokens_right has it; the last token predicts nothing and is not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.data import Evaluate, TaskSettings
from pipeline.distill.losses import valid_tokens
from pipeline.errors import ConfigError
from pipeline.models.build import decoding
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import CONTRAST, DISTILLATION, NEXT_TOKEN
from pipeline.tasks.scoring import Scores, score_tokens
from pipeline.tasks.task import Encoded, Task
from pipeline.tasks.tokenizers import END_OF_TEXT, PADDING, encoded, token_bytes

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODE_DOCUMENTS = 64
ROUGES = ("rouge1", "rouge2", "rougeL")  # ROUGE-Lsum would need a download at run time


@dataclass(frozen=True)
class Summarization(Task):
    """Sources and summaries. `start` is what the decoder reads first; None: the tokenizer's end-of-text, as in BART."""

    start: int | None = None
    special_tokens: ClassVar[tuple[str, ...]] = (END_OF_TEXT, PADDING)
    encoder_decoder: ClassVar[bool] = True
    document: ClassVar[str] = "document with a summary"
    bytes_a_row: ClassVar[int] = 2000  # a guess, for corpora not yet read
    protocol: ClassVar[str] = (
        "teacher-forced token metrics over the summary; ROUGE F-measure with stemming, 0-100, of beam search (length "
        "penalty 1, no trigram twice) against the summary cut to its row"
    )

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> Summarization:
        return cls(TaskSettings.model_validate(recipe["task"]), recipe.get("decoder_start"))

    @property
    def positions(self) -> dict[str, int]:
        return {"task.source_length": self.settings.source_length, "task.target_length": self.settings.target_length}

    @property
    def states(self) -> int:
        return self.settings.target_length - 1

    @property
    def shape(self) -> str:
        return f"source length {self.settings.source_length}, target length {self.settings.target_length}"

    def columns(self, data: dict[str, Any]) -> tuple[str, ...] | None:
        return data["text_column"], data.get("summary_column", "summary")

    def compared(self, document: Any) -> Any:
        """Return the text, whatever its summary."""
        return document[0]

    def strings(self, document: Any) -> Iterable[str]:
        return (text_of(field) for field in document)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ConfigError(
                "model.tokenizer: summarization needs an end-of-text and a padding token, and this tokenizer has "
                f"eos_token {tokenizer.eos_token!r} and pad_token {tokenizer.pad_token!r}."
            )

    def encode(
        self, documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase, split: str, collected: Any, unit: str
    ) -> Encoded:
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        source_length, target_length = self.settings.source_length, self.settings.target_length
        pairs = [(text_of(source), text_of(target)) for source, target in documents]
        pairs = [(source, target) for source, target in pairs if source.strip() and target.strip()]
        ids = np.full((len(pairs), source_length + target_length), padding, np.int32)
        lengths = np.zeros((len(pairs), 2), np.int32)
        start = end if self.start is None else self.start
        for first in range(0, len(pairs), ENCODE_DOCUMENTS):
            sources, targets = zip(*pairs[first : first + ENCODE_DOCUMENTS], strict=True)
            both = (encoded(tokenizer, list(texts), special_tokens=True) for texts in (sources, targets))
            for row, (source, target) in enumerate(zip(*both, strict=True), start=first):
                source = ended(source, end, source_length)
                target = [start, *ended(target, end, target_length - 1)]
                ids[row, : len(source)] = source
                ids[row, source_length : source_length + len(target)] = target
                lengths[row] = len(source), len(target)
        return ids, lengths, sum(len(text.encode()) for pair in pairs for text in pair)

    def model_settings(self, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
        start = end_of_text if self.start is None else self.start
        return {"pad_token_id": padding, "decoder_start_token_id": start, "forced_eos_token_id": end_of_text}

    def known_by(self, row: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the source, whatever its summary."""
        return row[: int(lengths[0])]

    def batch(self, ids: Tensor, lengths: Tensor) -> Batch:
        width = self.settings.source_length
        source, target = ids[:, :width], ids[:, width:]
        ends, mask = lengths[:, 1] - 1, valid_tokens(lengths[:, 0], width).long()
        valid = valid_tokens(ends, target.shape[1] - 1)
        return Batch(target[:, :-1], ends, target[:, 1:], valid, distilled=valid, source_ids=source, source_mask=mask)

    def counts(self, lengths: NDArray[Any]) -> dict[str, int]:
        return dict.fromkeys((NEXT_TOKEN, DISTILLATION, CONTRAST), int((lengths[:, 1] - 1).sum()))

    def scoring(self, evaluate: Evaluate) -> dict[str, Any]:
        return {"evaluate": evaluate.model_dump(mode="json")}

    def score(
        self,
        rows: Iterable[tuple[Tensor, Tensor]],
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Evaluate,
        generated: Collection[int] | None = None,
    ) -> tuple[Scores, Scores]:
        batches = [self.batch(ids, lengths).to(model.device) for ids, lengths in rows]
        ours, reference = score_tokens(batches, model, token_bytes(tokenizer), teacher)
        theirs = reference or Scores()
        for writer, scores in ((model, ours), (teacher, theirs)):
            written, expected = self._write(batches, writer, tokenizer, evaluate.beams, generated)
            scores.measure(rouge(written, expected))
        return ours, theirs

    def _write(
        self,
        batches: list[Batch],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        beams: int,
        generated: Collection[int] | None,
    ) -> tuple[list[str], list[str]]:
        """Return what beam search writes for the rows of these numbers, and their summaries."""
        texts = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        padding = torch.tensor(tokenizer.pad_token_id)
        written: list[str] = []
        expected: list[str] = []
        first = 0  # row of a batch
        for batch in batches:
            own = [row for row in range(len(batch.ids)) if generated is None or first + row in generated]
            first += len(batch.ids)
            if own and batch.source_ids is not None and batch.source_mask is not None:
                source, mask = batch.source_ids[own], batch.source_mask[own]
                length, start = self.settings.target_length, int(batch.ids[0, 0])
                written += texts(summaries(model, source, mask, length, beams, start).tolist())
                expected += texts(batch.targets[own].where(batch.supervised[own], padding).tolist())
        return written, expected


def rouge(written: Sequence[str], expected: Sequence[str]) -> dict[str, list[float]]:
    """Return the F-measures, 0-100, of each text against its one reference; words are stemmed (Porter)."""
    if not written:
        return {}
    from torchmetrics.functional.text import rouge_score  # on use: its import takes seconds

    measure = partial(rouge_score, rouge_keys=ROUGES, use_stemmer=True)
    measured = [measure(text, reference) for text, reference in zip(written, expected, strict=True)]
    return {name: [100 * float(of_text[f"{name}_fmeasure"]) for of_text in measured] for name in ROUGES}


def ended(ids: list[int], end: int, length: int) -> list[int]:
    """Return ids cut to at most `length` tokens, of which the last is end-of-text."""
    body = ids[:-1] if ids and ids[-1] == end else ids
    return [*body[: length - 1], end]


def text_of(field: Any) -> str:
    """Return the text of a field; a list of texts is one after the other."""
    return field if isinstance(field, str) else " ".join(field)


@torch.no_grad()
def summaries(
    model: PreTrainedModel, source_ids: Tensor, source_mask: Tensor, length: int, beams: int, start: int | None = None
) -> Tensor:
    """Return ids (batch, at most `length`) that beam search writes; `start` None: as the model's configuration says."""
    from transformers import GenerationConfig

    config = model.config
    longest = int(source_mask.sum(1).max())
    settings = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        early_stopping=beams > 1,
        length_penalty=1.0,
        no_repeat_ngram_size=3,
        max_new_tokens=length - 1,
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        decoder_start_token_id=config.decoder_start_token_id if start is None else start,
    )
    own, model.generation_config = model.generation_config, settings  # which would fill what is not said here
    try:
        source = {"input_ids": source_ids[:, :longest], "attention_mask": source_mask[:, :longest]}
        ids: Tensor = model.generate(**source, **decoding(model), generation_config=settings)
    finally:
        model.generation_config = own
    return ids
