"""What a cache keeps of the teacher at every position: its last hidden states, from which its whole distribution is
computed again, or tokens drawn from that distribution, in far fewer bytes, which are right on average."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pipeline.config.training import Cache
from pipeline.distill.draws import drawn, starts
from pipeline.distill.transfer import sent
from pipeline.models.device import bf16_on_gpu
from pipeline.models.hidden_states import head_of, last_states, teachers_logits
from pipeline.store.shards import Stored, StoredDraws, StoredStates, dtype_of_ids
from pipeline.tasks.batch import Batch
from pipeline.tasks.chunks import parts_of

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedModel

BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4}
# From which tokens are drawn at once, by the kind of device; their cumulative sums are fp64. Memory for more than that
# comes from the system anew each time on a CPU, which takes longer than to draw.
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}


@dataclass(frozen=True)
class Kept(ABC):
    """A kind of value at a position, of some dtype."""

    dtype: str

    @property
    def exact(self) -> tuple[str, ...]:
        """Return the knobs, set, with which it costs nothing."""
        return ()

    @abstractmethod
    def row_bytes(self, positions: int, hidden: int) -> int:
        """Return the bytes of a row."""

    @abstractmethod
    def of(self, model: PreTrainedModel, batch: Batch) -> Stored:
        """Return what is kept of a teacher, a row of the batch first."""

    @abstractmethod
    def probed(self, model: PreTrainedModel, batch: Batch) -> tuple[Kept, Tensor]:
        """Return what the teacher can be kept as, and the logits that it then stands for."""


@dataclass(frozen=True)
class KeptStates(Kept):
    """The states that the head reads; int8 codes have fp32 scales."""

    def __str__(self) -> str:
        return f"states as {self.dtype}"

    @property
    def exact(self) -> tuple[str, ...]:
        return ("cache.dtype: float32",)

    def row_bytes(self, positions: int, hidden: int) -> int:
        scales = 4 * (positions + hidden) if self.dtype == "int8" else 0
        return positions * hidden * BYTES_OF[self.dtype] + scales

    def of(self, model: PreTrainedModel, batch: Batch) -> StoredStates:
        states = last_states(model, *batch.inputs)
        return StoredStates.of(states if batch.group == 1 else states.unflatten(0, (-1, batch.group)), self.dtype)

    def probed(self, model: PreTrainedModel, batch: Batch) -> tuple[Kept, Tensor]:
        """Return the dtype to store too: float16 gives way to bfloat16 where it overflows."""
        with bf16_on_gpu(batch.ids.device):
            states = last_states(model, *batch.inputs)
        stored = StoredStates.of(states, self.dtype)
        if not finite(stored):
            stored = StoredStates.of(states, "bfloat16")
        return KeptStates(stored.dtype), teachers_logits(head_of(model), stored.wide())


@dataclass(frozen=True)
class KeptDraws(Kept):
    """As many tokens, drawn from the teacher's distribution; one that was drawn several times is kept as often."""

    draws: int

    def __str__(self) -> str:
        return f"{self.draws} drawn tokens a position"

    def row_bytes(self, positions: int, hidden: int) -> int:
        return positions * self.draws * BYTES_OF[self.dtype]

    def of(self, model: PreTrainedModel, batch: Batch) -> StoredDraws:
        head, states = head_of(model), last_states(model, *batch.inputs)
        start = sent(starts(batch.on_host.ids), batch.ids.device)
        tokens = torch.empty((*start.shape, self.draws), dtype=getattr(torch, self.dtype), device=start.device)
        for part in parts_of(batch, int(model.config.vocab_size), LOGITS_AT_ONCE[start.device.type]):
            tokens[part] = drawn(teachers_logits(head, states[part]), start[part], self.draws).to(tokens.dtype)
        return StoredDraws(tokens)

    def probed(self, model: PreTrainedModel, batch: Batch) -> tuple[Kept, Tensor]:
        logits = logits_online(model, batch)
        return replace(self, dtype=dtype_of_ids(logits.shape[-1])), logits


def logits_online(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a teacher that runs in a step."""
    with bf16_on_gpu(batch.ids.device):
        states = last_states(model, *batch.inputs)
    return teachers_logits(head_of(model), states)


class Vocabulary(Protocol):
    """What knows how many tokens a model tells apart."""

    @property
    def vocabulary(self) -> int: ...


def kept_by(mode: str, cache: Cache, model: Vocabulary) -> Kept | None:
    """Return what a cache of a mode keeps of a teacher; None: nothing, it runs in each step."""
    if mode == "logits":
        return KeptDraws(dtype_of_ids(model.vocabulary), cache.draws)
    return KeptStates(cache.dtype) if mode == "states" else None


def finite(stored: Stored) -> Tensor:
    """Return whether the dtype holds all values, bool, where they lie; float16 may overflow."""
    return stored.tensors[-1].isfinite().all()
