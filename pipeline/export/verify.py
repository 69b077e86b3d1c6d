"""The proof that an export computes what the packed model computes, in the runtime it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.base import Closed
from pipeline.export.probes import Probes

MAX_PERPLEXITY_CHANGE = 0.005
LEAST_COVERED = 0.5
SCALE_ROUNDING = 2.0**-10  # of a scale in fp16, and of its product with a level in fp16
Logits = Callable[..., NDArray[np.float32]]
LogProbs = NDArray[np.float64]


class Verdict(Closed):
    """What was measured of an export, and the reasons against it; none means it is kept.

    Differences are of log-probabilities in nats: not every runtime gives logits. `delta_p999` is the 99.9th percentile
    over steps and vocabulary; a step is covered if the packed model's first token leads by more than twice that.
    """

    format: str
    digest: str
    prompts: int
    steps: int
    probe: str
    activations: str
    delta_max: float
    delta_p999: float
    covered: float
    disagreements: int  # of the covered steps
    agreement: float  # of all steps
    perplexity_packed: float
    perplexity_export: float
    tensors_read_back: int
    read_back_error: float | None  # relative to the level
    bytes: int
    package_bytes: int
    notes: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Tell whether nothing speaks against the export."""
        return not self.reasons


def measure(model: PreTrainedModel, logits: Logits, probes: Probes) -> dict[str, Any]:
    """Measure the differences between the packed model and a runtime, teacher-forced over the probes."""
    paths = [rows[:2] for rows in _both(model, logits, probes.paths, probes.sources)]
    ours, theirs = (np.concatenate([path[-probes.steps :] for path in rows]) for rows in zip(*paths, strict=True))
    delta = np.abs(ours - theirs)
    tail = float(np.quantile(delta, 0.999))
    leaders = np.partition(ours, -2, axis=1)[:, -2:]
    covered = leaders[:, 1] - leaders[:, 0] > 2 * tail
    same = ours.argmax(1) == theirs.argmax(1)
    mine, other = _perplexities(model, logits, probes)
    return {
        "prompts": len(probes.paths),
        "steps": probes.steps,
        "delta_max": float(delta.max()),
        "delta_p999": tail,
        "covered": float(covered.mean()),
        "disagreements": int((covered & ~same).sum()),
        "agreement": float(same.mean()),
        "perplexity_packed": mine,
        "perplexity_export": other,
    }


def reasons_against(measured: dict[str, Any], read_back_error: float | None) -> tuple[str, ...]:
    """Return why an export cannot be kept."""
    reasons = []
    change = abs(measured["perplexity_export"] / measured["perplexity_packed"] - 1)
    if not np.isfinite([measured["delta_max"], change]).all():
        return ("the runtime gives numbers that are not finite",)
    if read_back_error is not None and not read_back_error <= SCALE_ROUNDING:
        reasons.append(f"a tensor reads back {read_back_error:.2g} off its levels, more than the rounding of the scale")
    if measured["disagreements"]:
        reasons.append(
            f"at {measured['disagreements']} steps it prefers another token although the packed model's leads by more "
            f"than {2 * measured['delta_p999']:.3g} nats"
        )
    if measured["covered"] < LEAST_COVERED:
        reasons.append(
            f"log-probabilities differ by {measured['delta_p999']:.3g} nats (99.9th percentile), so that only "
            f"{measured['covered']:.0%} of the steps are decided; at least {LEAST_COVERED:.0%} are needed"
        )
    if change > MAX_PERPLEXITY_CHANGE:
        reasons.append(f"its perplexity differs by {change:.2%}, more than {MAX_PERPLEXITY_CHANGE:.1%}")
    return tuple(reasons)


def _perplexities(model: PreTrainedModel, logits: Logits, probes: Probes) -> tuple[float, float]:
    sums, tokens = np.zeros(2), 0
    for ours, theirs, row in _both(model, logits, probes.rows, probes.sources):
        places = np.arange(len(ours)), row[1:]
        sums -= [ours[places].sum(), theirs[places].sum()]
        tokens += len(ours)
    mine, other = np.exp(sums / tokens)
    return float(mine), float(other)


@torch.no_grad()
def _both(
    model: PreTrainedModel, logits: Logits, rows: Tensor, sources: Tensor | None
) -> Iterator[tuple[LogProbs, LogProbs, NDArray[np.int64]]]:
    """Yield log-probabilities of both on a row without its last token, and the row; a runtime may know no batches."""
    for index, row in enumerate(rows):
        given = {"input_ids": row[None, :-1]}
        source: list[list[int]] = []
        if sources is not None:
            given = {"input_ids": sources[index : index + 1], "decoder_input_ids": row[None, :-1]}
            source = [sources[index].tolist()]
        ours = model(**given).logits[0].double().numpy()
        theirs = np.asarray(logits(row[:-1].tolist(), *source), np.float64)
        yield _log_softmax(ours), _log_softmax(theirs), row.numpy()


def _log_softmax(values: LogProbs) -> LogProbs:
    """Return log-probabilities; those that are given stay as they are."""
    shifted = values - values.max(axis=-1, keepdims=True)
    normalized: LogProbs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def bytes_of(folder: Path) -> int:
    """Count the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
