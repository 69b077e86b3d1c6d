"""Where a student leaves its teacher in text that the teacher writes, offline and in a minute or so.

The teacher goes on greedily from prompts of the validation split. Both models then read what it wrote, and at each of
its tokens are asked for the next: whether the student's first choice is the teacher's, or is flipped to another, and
KL(teacher || student), by how far behind the prompt the token is, and by how common it is in the training text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.blocks import positions_of
from pipeline.models.build import decoding
from pipeline.models.hidden_states import head_input, head_of, head_product, last_states
from pipeline.store.records import SplitName
from pipeline.tasks.batch import Batch
from pipeline.tasks.scoring import token_nats
from pipeline.tasks.task import Task

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel

NAME = "generated"
SPLIT: SplitName = "validation"
PROMPTS, TOKENS = 32, 32  # rows that are drawn; tokens that are written after each, at most
READ_AT_ONCE = 8  # rows of a pass, at most
COUNTED_SHARDS = 16  # of training rows, by which tokens are common
POSITIONS = (1, 2, 5, 17)  # tokens behind the prompt with which a band begins
COMMON = {"commonest, half of the text": 0.5, "to three quarters": 0.75, "to nine tenths": 0.9, "the rest": 1.0}
UNSEEN = "never in the training text"


@dataclass(frozen=True)
class Written:
    """What a decoder reads of a prompt and what was written after it (tokens,), where that begins, and what an encoder
    reads (tokens,), if there is one."""

    ids: Tensor
    start: int
    source: Tensor | None = None


def recipe() -> dict[str, Any]:
    """Return what the suite's numbers depend on beside the models and the rows."""
    return {"version": 2, "prompts": PROMPTS, "tokens": TOKENS}


def measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
    batch: Batch,
    counts: NDArray[np.int64],
    at_once: int = READ_AT_ONCE,
) -> dict[str, Any]:
    """Return the suite's metrics and its two tables, of prompts from rows of a batch on the host; `counts` says how
    often each token is in the training text. Of the rows no more than `at_once` are in a pass."""
    at_once = min(READ_AT_ONCE, at_once)
    texts = written(teacher, prompts(task, batch), at_once)
    kl, agreed = compared(student, teacher, texts, at_once)
    place = np.concatenate([np.arange(1, len(text.ids) - text.start + 1) for text in texts])
    tokens = np.concatenate([text.ids[text.start :].numpy() for text in texts])
    first, ends = place == 1, [*POSITIONS[1:], None]
    bands = {
        _named(low, high): (place >= low) & (place < (high or np.inf))
        for low, high in zip(POSITIONS, ends, strict=True)
    }
    common = commonness(counts)[tokens]
    shares = {name: common == index for index, name in enumerate((*COMMON, UNSEEN))}
    metrics = {
        "generated_first_agreement": float(agreed[first].mean()),
        "generated_flips": float(1 - agreed.mean()),
        "generated_kl_nats": float(kl.mean()),
    }
    tables = {name: _table(rows, kl, agreed) for name, rows in (("position", bands), ("frequency", shares))}
    facts = {"split": SPLIT, "prompts": len(texts), "tokens": len(tokens)}
    return {**facts, "student": metrics, "teacher": {}, "tables": tables}


def prompts(task: Task, batch: Batch) -> list[Written]:
    """Return what each row begins with, and nothing written yet: what an encoder reads; else all before the first token
    that is learned, or half of running text, of the first document where a row packs several. Of a prompt that leaves
    too little room, its end."""
    begun = []
    for row, ids in enumerate(batch.ids):
        if batch.source_ids is not None and batch.source_mask is not None:
            source = batch.source_ids[row, : int(batch.source_mask[row].sum())]
            begun.append(Written(ids[:1], 1, source))
            continue
        first = int(batch.supervised[row].int().argmax()) + 1  # before a token that is learned
        before = ids[: first if first > 1 else max(1, batch.first_document(row) // 2)]
        kept = before[-(len(ids) - _room(len(ids))) :]
        begun.append(Written(kept, len(kept)))
    return begun


def _room(width: int) -> int:
    return max(1, min(TOKENS, width // 2))


@torch.no_grad()
def written(model: PreTrainedModel, begun: Sequence[Written], at_once: int = READ_AT_ONCE) -> list[Written]:
    """Return the prompts with what the model greedily writes after each, up to and with its end of text; `at_once` in
    a pass. Of the model's own settings of generation only its ends count."""
    from transformers import GenerationConfig

    config, own, encodes = model.config, model.generation_config, begun[0].source is not None
    given = (getattr(of, "eos_token_id", None) for of in (config, own))
    ends = list(dict.fromkeys(end for of in given for end in ([of] if isinstance(of, int) else of or ())))
    padding = next((end for end in (config.pad_token_id, *ends) if end is not None), 0)
    longest = 1 if encodes else max(len(text.ids) for text in begun)
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=padding,
        decoder_start_token_id=int(begun[0].ids[0]) if encodes else None,
        max_new_tokens=max(1, min(TOKENS, positions_of(config) - longest)),
    )
    texts: list[Written] = []
    model.generation_config = settings  # which would fill what is not said here
    try:
        for start in range(0, len(begun), at_once):
            few = begun[start : start + at_once]
            made = model.generate(**_read(model, few, padding), **decoding(model), generation_config=settings).cpu()
            for text, row in zip(few, made[:, _longest(few) :], strict=True):
                stop = next((place + 1 for place, token in enumerate(row.tolist()) if token in ends), len(row))
                texts.append(Written(torch.cat([text.ids, row[:stop]]), text.start, text.source))
    finally:
        model.generation_config = own
    return texts


def _longest(few: Sequence[Written]) -> int:
    return max(len(text.ids) for text in few)


def _read(model: PreTrainedModel, few: Sequence[Written], padding: int) -> dict[str, Tensor]:
    """Return what the model goes on from: what a decoder reads is padded on the left, what an encoder reads on the
    right."""
    encodes = few[0].source is not None
    read = [text.ids if text.source is None else text.source for text in few]
    side = "right" if encodes else "left"
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    given = {
        "input_ids": pad(read, padding_value=padding),
        "attention_mask": pad([torch.ones_like(ids, dtype=torch.long) for ids in read]),
    }
    if encodes:
        given["decoder_input_ids"] = torch.stack([text.ids for text in few])
    return {name: ids.to(model.device) for name, ids in given.items()}


@torch.no_grad()
def compared(
    student: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Written], at_once: int = READ_AT_ONCE
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(teacher || student), nats, and whether both have the same first choice, at every token written; of
    `at_once` texts in a pass."""
    kl, agreed = [], []
    for start in range(0, len(texts), at_once):
        few = texts[start : start + at_once]
        ids = _padded([text.ids for text in few])
        given: tuple[Tensor, ...] = (ids,)
        if few[0].source is not None:
            sources = [text.source for text in few if text.source is not None]
            mask = _padded([torch.ones_like(source) for source in sources])
            given = ids, _padded(sources), mask
        told = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(few):
            told[row, text.start - 1 : len(text.ids) - 1] = True  # each token is told by the position before it
        ours, theirs = (_logits(model, given, told) for model in (student, teacher))
        targets = ids[:, 1:][told[:, :-1]][None].to(ours.device)
        _, _, cross, entropy, same = token_nats(ours, theirs, targets)
        kl.append((cross - entropy)[0].double().cpu().numpy())
        agreed.append(same[0].cpu().numpy())
    return np.concatenate(kl), np.concatenate(agreed)


def _logits(model: PreTrainedModel, given: tuple[Tensor, ...], told: Tensor) -> Tensor:
    """Return logits (1, positions, vocabulary) at the positions that are told of rows, and at no others."""
    head, states = head_of(model), last_states(model, *(tensor.to(model.device) for tensor in given))
    return head_product(head, head_input(head, states)[told.to(states.device)][None])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def count_tokens(documents: Iterable[NDArray[np.int32]], vocabulary: int) -> NDArray[np.int64]:
    """Return how often each token is in documents."""
    counts = np.zeros(vocabulary, np.int64)
    for ids in documents:
        counts += np.bincount(ids, minlength=vocabulary)
    return counts


def commonness(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each token its band: which share of the text those make up that are more common, and a last one of
    tokens that are not in it."""
    order = np.argsort(-counts, kind="stable")
    share = np.empty(len(counts))
    share[order] = (np.cumsum(counts[order]) - counts[order]) / max(1, counts.sum())
    bands: NDArray[np.int64] = np.searchsorted([*COMMON.values()][:-1], share, side="right")
    return np.where(counts > 0, bands, len(COMMON))


def _named(low: int, high: int | None) -> str:
    return f"{low} and on" if high is None else str(low) if high == low + 1 else f"{low} to {high - 1}"


def _table(
    bands: dict[str, NDArray[np.bool_]], kl: NDArray[np.float64], agreed: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Return tokens, mean KL and share of flips of each band that has a token."""
    return [
        {
            "band": name,
            "tokens": int(here.sum()),
            "kl_nats": float(kl[here].mean()),
            "flips": float(1 - agreed[here].mean()),
        }
        for name, here in bands.items()
        if here.any()
    ]
