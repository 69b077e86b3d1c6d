"""Scores over tokens: perplexity, bits per byte, and how far a model is from its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.hidden_states import last_states, logits_of
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import candidate_scores

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel

CACHED_VALUES = 2**18  # of a table of logits


@dataclass
class Scores:
    """Sums over a text; divide once, in `metrics`. Next-token nats are summed for each document of the text by itself;
    one that goes on from a text into the next is joined where the scores of both are added."""

    nats: list[float] = field(default_factory=list)  # of each document
    tokens: list[int] = field(default_factory=list)  # of each document, those that have nats
    goes_on: bool = False  # the last document does, in the text that follows
    bytes: int = 0
    kl_nats: float = 0.0
    agreed: int = 0
    compared: int = 0
    of_rows: dict[str, list[float]] = field(default_factory=dict)  # what is a mean over rows, such as accuracy, of each

    def __add__(self, other: Scores) -> Scores:
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        both = Scores(list(self.nats), list(self.tokens), self.goes_on, **counts)
        both.append(other.nats, other.tokens, other.goes_on)
        for scores in (self, other):
            both.measure(scores.of_rows)
        return both

    def append(self, nats: list[float], tokens: list[int], goes_on: bool) -> None:
        """Add the documents that follow; the first may be the rest of the last."""
        if not nats:
            return
        if self.goes_on:
            self.nats[-1] += nats[0]
            self.tokens[-1] += tokens[0]
        self.nats += nats[self.goes_on :]
        self.tokens += tokens[self.goes_on :]
        self.goes_on = goes_on

    def metrics(self) -> dict[str, float]:
        """Return perplexity, bits_per_byte, kl_nats and top1_agreement against a teacher, and means over rows."""
        total = math.fsum(self.nats)
        nats = total / sum(self.tokens)
        metrics = {"perplexity": math.exp(min(nats, 700.0)), "nats_per_token": nats}
        if self.bytes:
            metrics["bits_per_byte"] = total / math.log(2) / self.bytes
        if self.compared:
            metrics["kl_nats"] = self.kl_nats / self.compared
            metrics["top1_agreement"] = self.agreed / self.compared
        return metrics | {name: fmean(values) for name, values in self.of_rows.items()}

    def measure(self, of_rows: Mapping[str, Sequence[float]]) -> None:
        """Add what was measured of rows that follow, by metric."""
        for name, values in of_rows.items():
            self.of_rows.setdefault(name, []).extend(values)

    def add(self, nats: Tensor, logits: Tensor, batch: Batch, bytes_of: Tensor, documents: Documents) -> None:
        """Add next-token nats, those of `token_nats`, and bytes of each row's reference, and accuracy where a row has
        candidates."""
        first = batch.references()
        nats = nats[:, : first.targets.shape[1]] * first.supervised
        self.append(documents.sums(nats.double()), documents.sums(first.supervised.long()), documents.goes_on)
        self.bytes += int(bytes_of[first.targets][first.supervised].sum())
        if batch.group > 1:
            self.measure({"accuracy": chosen(candidate_scores(logits, batch))})

    def compare(self, cross: Tensor, entropy: Tensor, agreed: Tensor, distilled: Tensor) -> None:
        """Add KL(teacher || model) and agreement at the distilled positions of each row's reference."""
        cross, entropy = ((nats * distilled).sum(dtype=torch.float64) for nats in (cross, entropy))
        self.kl_nats += float(cross - entropy)
        self.agreed += int((agreed & distilled).sum())
        self.compared += int(distilled.sum())


COUNTS = ("bytes", "kl_nats", "agreed", "compared")  # of `Scores`, which add up


@dataclass(frozen=True)
class Documents:
    """The documents that the targets of a batch's references belong to."""

    index: Tensor  # (references, targets) of each target
    count: int
    goes_on: bool  # the last does, in the next batch

    def sums(self, values: Tensor) -> list[Any]:
        """Return the sums over each document of values of targets (references, targets)."""
        sums = values.new_zeros(self.count + 1)  # the last takes the padding behind the last document
        index = self.index.to(values.device).flatten()
        totals: list[Any] = sums.index_add(0, index, values.flatten())[: self.count].tolist()
        return totals


def documents_of(batch: Batch, end_of_text: int | None) -> Documents:
    """Tell the documents of rows (references, length) apart: a document ends with the token `end_of_text`, which
    belongs to it, and goes on from one row into the next; None: each row is one, or several that it packs."""
    first = batch.references()
    rows, targets = first.targets.shape
    if first.positions is not None:
        begun = ((first.positions == 0) & first.valid).flatten().cumsum(0).view_as(first.ids)
        return Documents(begun[:, -targets:] - 1, int(begun[-1, -1]), False)
    if end_of_text is None:
        return Documents(torch.arange(rows).unsqueeze(1).expand(rows, targets), rows, False)
    ends = (first.ids == end_of_text) & first.valid
    before = (ends.flatten().cumsum(0) - ends.flatten().long()).view_as(ends)
    goes_on = not bool(ends[-1, first.lengths[-1] - 1])
    return Documents(before[:, -targets:], int(ends.sum()) + goes_on, goes_on)


@torch.no_grad()
def score_tokens(
    batches: Iterable[Batch],
    model: PreTrainedModel,
    bytes_of: Tensor,
    teacher: PreTrainedModel | None = None,
    end_of_text: int | None = None,
) -> tuple[Scores, Scores | None]:
    """Score a model, and a teacher beside it; `end_of_text` as in `documents_of`. Sums run in fp64."""
    scores = Scores()
    teacher_scores = Scores() if teacher is not None else None
    bytes_of = bytes_of.to(model.device)
    for batch in batches:
        documents = documents_of(batch, end_of_text)  # before a GPU has the batch, which would have to wait
        batch = batch.to(model.device)
        first, logits = batch.references(), logits_for(model, batch)
        reference = logits_for(teacher, batch) if teacher is not None else None
        beside = None if reference is None else reference[:: batch.group]
        nats, *compared = token_nats(logits[:: batch.group], beside, first.targets)
        scores.add(nats, logits, batch, bytes_of, documents)
        if reference is not None and teacher_scores is not None:
            teacher_nats, cross, entropy, agreed = compared
            teacher_scores.add(teacher_nats, reference, batch, bytes_of, documents)
            scores.compare(cross, entropy, agreed, first.distilled)
    return scores, teacher_scores


def token_nats(logits: Tensor, teacher: Tensor | None, targets: Tensor) -> list[Tensor]:
    """Return the nats of the target that each position predicts; beside a teacher the teacher's too, the cross-entropy
    of model and teacher, the teacher's entropy, nats, and whether both have the same first token: (batch, length) each.

    Each distribution is made once, on a CPU of so few tokens at a time that it stays in the cache. What the positions
    say that have no target is of none.
    """
    ids = F.pad(targets, (0, logits.shape[1] - targets.shape[1])).flatten().unsqueeze(1)
    at_once = len(ids) if logits.is_cuda else max(1, CACHED_VALUES // logits.shape[-1])
    tables = [table.flatten(0, 1).split(at_once) for table in (logits, teacher) if table is not None]
    parts = []
    for target, *rows in zip(ids.split(at_once), *tables, strict=True):
        logs = [row.float().log_softmax(-1) for row in rows]
        part = [-log.gather(1, target).squeeze(1) for log in logs]
        if teacher is not None:
            likely = rows[1].float().softmax(-1)
            part += [-(likely * log).sum(-1) for log in logs]
            part.append(rows[0].argmax(-1) == rows[1].argmax(-1))
        parts.append(part)
    return [torch.cat(column).view(logits.shape[:2]) for column in zip(*parts, strict=True)]


def chosen(scores: Tensor) -> list[float]:
    """Return 1 for each row of (rows, candidates) that has its first score above all others, else 0."""
    right: list[float] = (scores[:, :1] > scores[:, 1:]).all(1).double().tolist()
    return right


def logits_for(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a model (sequences, length, vocabulary)."""
    return logits_of(model, last_states(model, *batch.inputs))
