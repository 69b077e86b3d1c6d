"""Language modelling: text as blocks of tokens, scored by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.distill.losses import logit_distillation_loss, next_token_loss, valid_tokens
from pipeline.families.models import last_states

PROTOCOL = "blocks without overlap, stride = block length, no BOS; the first token of a block is context only"
ENCODE_CHARACTERS = 2**20  # running text is encoded in pieces of about this size, cut at line ends


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


@dataclass
class Scores:
    """Sums over tokens of a text; divide once, in `metrics`."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    kl_nats: float = 0.0
    agreed: int = 0
    compared: int = 0

    def metrics(self) -> dict[str, float]:
        """perplexity, bits_per_byte and, against a teacher, kl_nats and top1_agreement per token."""
        nats = self.nats / self.tokens
        found = {"perplexity": math.exp(min(nats, 700.0)), "nats_per_token": nats}
        if self.bytes:
            found["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        if self.compared:
            found["kl_nats"] = self.kl_nats / self.compared
            found["top1_agreement"] = self.agreed / self.compared
        return found


@torch.no_grad()
def score(
    batches: Iterable[tuple[Tensor, Tensor]],
    model: PreTrainedModel,
    bytes_of: Tensor,
    teacher: PreTrainedModel | None = None,
) -> tuple[Scores, Scores | None]:
    """Score a model, and a teacher beside it, over batches of ids (batch, length) and lengths (batch,).

    The model's kl_nats is KL(teacher || model) over all valid tokens. Sums run in fp64.
    """
    scores = Scores()
    teacher_scores = Scores() if teacher is not None else None
    for ids, lengths in batches:
        logits = _logits(model, ids)
        _add(scores, logits, ids, lengths, bytes_of)
        if teacher is None or teacher_scores is None:
            continue
        reference = _logits(teacher, ids)
        _add(teacher_scores, reference, ids, lengths, bytes_of)
        valid = valid_tokens(lengths, ids.shape[1])
        cross, count = logit_distillation_loss(logits, reference, valid)
        entropy, _ = logit_distillation_loss(reference, reference, valid)
        scores.kl_nats += float(cross - entropy)
        scores.agreed += int(((logits.argmax(-1) == reference.argmax(-1)) & valid).sum())
        scores.compared += int(count)
    return scores, teacher_scores


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(last_states(model, ids))
    return logits


def _add(scores: Scores, logits: Tensor, ids: Tensor, lengths: Tensor, bytes_of: Tensor) -> None:
    nats, count = next_token_loss(logits, ids, lengths)
    scores.nats += float(nats)
    scores.tokens += int(count)
    predicted = valid_tokens(lengths, ids.shape[1])[:, 1:]
    scores.bytes += int(bytes_of[ids[:, 1:]][predicted].sum())
