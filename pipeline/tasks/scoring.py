"""Scores over tokens: perplexity, bits per byte, and how far a model is from its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.distill.losses import logit_distillation_loss
from pipeline.models.hidden_states import last_states, logits_of
from pipeline.tasks.batch import Batch
from pipeline.tasks.losses import candidate_scores, reference_nats

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedModel


@dataclass
class Scores:
    """Sums over a text; divide once, in `metrics`."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    kl_nats: float = 0.0
    agreed: int = 0
    compared: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # over rows, of what is a mean over rows, such as accuracy
    rows: int = 0  # behind `sums`

    def __add__(self, other: Scores) -> Scores:
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in {**self.sums, **other.sums}}
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "sums"}
        return Scores(**counts, sums=sums)

    def metrics(self) -> dict[str, float]:
        """Return perplexity, bits_per_byte, kl_nats and top1_agreement against a teacher, and means over rows."""
        nats = self.nats / self.tokens
        metrics = {"perplexity": math.exp(min(nats, 700.0)), "nats_per_token": nats}
        if self.bytes:
            metrics["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        if self.compared:
            metrics["kl_nats"] = self.kl_nats / self.compared
            metrics["top1_agreement"] = self.agreed / self.compared
        return metrics | {name: total / self.rows for name, total in self.sums.items()}

    def average(self, sums: dict[str, float], rows: int) -> None:
        """Add what is a mean over rows, summed over some of them."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.rows += rows

    def add(self, logits: Tensor, batch: Batch, bytes_of: Tensor) -> None:
        """Add next-token nats and bytes of each row's reference, and accuracy where a row has candidates."""
        first = batch.references()
        nats, count = reference_nats(logits, batch)
        self.nats += float(nats)
        self.tokens += int(count)
        self.bytes += int(bytes_of[first.targets][first.supervised].sum())
        if batch.group > 1:
            self.average({"accuracy": chosen(candidate_scores(logits, batch))}, len(first.ids))

    def compare(self, logits: Tensor, teacher: Tensor, batch: Batch) -> None:
        """Add KL(teacher || model) and agreement at the distilled positions of each row's reference."""
        logits, teacher, batch = logits[:: batch.group], teacher[:: batch.group], batch.references()
        cross, count = logit_distillation_loss(logits, teacher, batch.distilled)
        entropy, _ = logit_distillation_loss(teacher, teacher, batch.distilled)
        self.kl_nats += float(cross - entropy)
        self.agreed += int(((logits.argmax(-1) == teacher.argmax(-1)) & batch.distilled).sum())
        self.compared += int(count)


@torch.no_grad()
def score_tokens(
    batches: Iterable[Batch], model: PreTrainedModel, bytes_of: Tensor, teacher: PreTrainedModel | None = None
) -> tuple[Scores, Scores | None]:
    """Score a model, and a teacher beside it. Sums run in fp64."""
    scores = Scores()
    teacher_scores = Scores() if teacher is not None else None
    bytes_of = bytes_of.to(model.device)
    for batch in batches:
        batch = batch.to(model.device)
        logits = logits_for(model, batch)
        scores.add(logits, batch, bytes_of)
        if teacher is not None and teacher_scores is not None:
            reference = logits_for(teacher, batch)
            teacher_scores.add(reference, batch, bytes_of)
            scores.compare(logits, reference, batch)
    return scores, teacher_scores


def chosen(scores: Tensor) -> int:
    """Count the rows of (rows, candidates) that have their first score above all others."""
    return int((scores[:, :1] > scores[:, 1:]).all(1).sum())


def logits_for(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a model (sequences, length, vocabulary)."""
    return logits_of(model, last_states(model, *batch.inputs))
