"""Where a student leaves its teacher in text that the teacher writes, offline and in a minute or so.

The teacher goes on greedily from prompts of the validation split. Both models then read what it wrote, and at each of
its tokens are asked for the next: whether the student's first choice is the teacher's, or is flipped to another, and
KL(teacher || student), by how far behind the prompt the token is, and by how common it is in the training text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.hidden_states import last_states, logits_of
from pipeline.store.records import SplitName
from pipeline.tasks.batch import Batch
from pipeline.tasks.scoring import token_nats
from pipeline.tasks.task import Task

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel

NAME = "generated"
SPLIT: SplitName = "validation"
PROMPTS, TOKENS = 32, 32  # rows that are drawn; tokens that are written after each, at most
READ_AT_ONCE = 8  # rows of a pass
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
    return {"version": 1, "prompts": PROMPTS, "tokens": TOKENS}


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, task: Task, batch: Batch, counts: NDArray[np.int64]
) -> dict[str, Any]:
    """Return the suite's metrics and its two tables, of prompts from rows of a batch on the host; `counts` says how
    often each token is in the training text."""
    texts = written(teacher, prompts(task, batch))
    kl, agreed = compared(student, teacher, texts)
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
    that is learned, or half of running text. Of a prompt that leaves too little room, its end."""
    begun = []
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.ids[row]
        if batch.source_ids is not None and batch.source_mask is not None:
            source = batch.source_ids[row, : int(batch.source_mask[row].sum())]
            begun.append(Written(ids[:1], 1, source))
            continue
        first = int(batch.supervised[row].int().argmax()) + 1  # before a token that is learned
        before = ids[: first if first > 1 else max(1, length // 2)]
        kept = before[-(len(ids) - _room(len(ids))) :]
        begun.append(Written(kept, len(kept)))
    return begun


def _room(width: int) -> int:
    return max(1, min(TOKENS, width // 2))


@torch.no_grad()
def written(model: PreTrainedModel, begun: Sequence[Written]) -> list[Written]:
    """Return the prompts with what the model greedily writes after each, up to and with its end of text."""
    from transformers import GenerationConfig

    config, encodes = model.config, begun[0].source is not None
    end = config.eos_token_id
    ends = [end] if isinstance(end, int) else [*(end or ())]
    padding = ends[0] if ends else 0
    read = [text.ids if text.source is None else text.source for text in begun]
    longest, shape = max(map(len, read)), (len(read), max(map(len, read)))
    ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.long)
    for row, tokens in enumerate(read):
        here = slice(0, len(tokens)) if encodes else slice(longest - len(tokens), None)
        ids[row, here], mask[row, here] = tokens, 1
    positions = int(getattr(config, "max_position_embeddings", longest + TOKENS))
    more = max(1, min(TOKENS, positions - (1 if encodes else longest)))
    settings = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=padding, max_new_tokens=more)
    given = {"decoder_input_ids": torch.stack([text.ids for text in begun]).to(model.device)} if encodes else {}
    made = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings, **given
    ).cpu()
    texts = []
    for text, row in zip(begun, made[:, 1 if encodes else longest :], strict=True):
        stop = next((place + 1 for place, token in enumerate(row.tolist()) if token in ends), len(row))
        texts.append(Written(torch.cat([text.ids, row[:stop]]), text.start, text.source))
    return texts


@torch.no_grad()
def compared(
    student: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Written]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(teacher || student), nats, and whether both have the same first choice, at every token written."""
    kl, agreed = [], []
    for start in range(0, len(texts), READ_AT_ONCE):
        few = texts[start : start + READ_AT_ONCE]
        ids = _padded([text.ids for text in few])
        given: tuple[Tensor, ...] = (ids,)
        if few[0].source is not None:
            sources = [text.source for text in few if text.source is not None]
            mask = _padded([torch.ones_like(source) for source in sources])
            given = ids, _padded(sources), mask
        ours, theirs = (logits_of(m, last_states(m, *(t.to(m.device) for t in given))) for m in (student, teacher))
        _, _, cross, entropy, same = token_nats(ours, theirs, ids[:, 1:].to(ours.device))
        for row, text in enumerate(few):
            here = slice(text.start - 1, len(text.ids) - 1)  # each token is told by the position before it
            kl.append((cross - entropy)[row, here].double().cpu().numpy())
            agreed.append(same[row, here].cpu().numpy())
    return np.concatenate(kl), np.concatenate(agreed)


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
