"""The proof that an export computes what the packed model computes, in the runtime it is for.

Like is compared with like: `exact` has activations in fp32 on both sides, which leaves nothing but the rounding of
weights to fp16, whatever the model. Some runtimes round activations to 8 bits by a rule of their own, and so does a
package by another. As it runs there, an export may stray from the exact numbers by what the package's own rounding
costs (`rounding`), at most 1e-2 nats, and the same floor again, and in perplexity by what chance makes of such a
rounding in so few tokens. No floor depends on what is measured of the export.

What true exports need, KL in nats a token by their verdicts: GPT-2 and Llama are the tests' models, trained at 2-2-8,
the other two were rounded at 8-8-8. The likeliest token is the same at 99.6 % of all steps and more under fp32
activations; as they run, at 93.7 % on SmolLM2-135M, whose activations have outliers, and 97.7 % elsewhere. Noise of 0.1
logit costs 4.5e-3 nats. In llama.cpp the perplexity of SmolLM2-135M over 160 tokens was 0.78 % off, which is once the
deviation that 4.6e-3 nats make by chance.

| under fp32 activations  | GPT-2  | Llama  | stories260K | SmolLM2-135M |
|-------------------------|--------|--------|-------------|--------------|
| transformers            | 1.5e-7 | 0.9e-7 | 1.6e-6      | 4.6e-6       |
| compressed-tensors      |        | 0.9e-7 | 1.9e-6      |              |
| onnx, as it runs        | 4.6e-6 | 9.0e-6 | 1.0e-3      | 7.8e-3       |
| gguf, as it runs        | 5.3e-6 | 1.0e-5 | 5.4e-4      | 4.6e-3       |
| the package's rounding  | 4.9e-6 | 9.6e-6 | 1.6e-3      | 5.8e-2       |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.base import Closed
from pipeline.export.probes import Probes

MAX_KL_NATS, MAX_ROUNDING_NATS = 1e-3, 1e-2
LEAST_AGREEMENT, LEAST_AGREEMENT_ROUNDED = 0.99, 0.90
MAX_PERPLEXITY_CHANGE = 0.005
CHANCE = 3.0  # standard deviations, which one measurement of 370 is beyond
MAX_READ_BACK_ERROR = 2.0**-10  # a scale in fp16, and its product with a level in fp16
Logits = Callable[..., NDArray[np.float32]]
LogProbs = NDArray[np.float64]


class Comparison(Closed):
    """How far one model's distributions are from a reference's, over the same steps."""

    kl_nats: float  # KL(reference || model), the mean over steps
    agreement: float  # the share of all steps at which both find the same token likeliest
    perplexity: float
    perplexity_change: float  # relative to the reference's


class Floors(Closed):
    """What a comparison has to keep."""

    max_kl_nats: float = MAX_KL_NATS
    least_agreement: float = LEAST_AGREEMENT
    max_perplexity_change: float = MAX_PERPLEXITY_CHANGE

    def missed_by(self, measured: Comparison) -> list[str]:
        """Return a sentence for each floor that is not kept."""
        kl, same, change = measured.kl_nats, measured.agreement, measured.perplexity_change
        if not np.isfinite([kl, same, change]).all():
            return ["the runtime gives numbers that are not finite"]
        missed = []
        if kl > self.max_kl_nats:
            missed.append(f"KL(package || export) is {kl:.3g} nats a token, more than {self.max_kl_nats:.3g}")
        if same < self.least_agreement:
            missed.append(
                f"the likeliest token is the same at {same:.2%} of the steps, of {self.least_agreement:.0%} due"
            )
        if abs(change) > self.max_perplexity_change:
            missed.append(f"perplexity differs by {change:+.2%}, more than {self.max_perplexity_change:.1%}")
        return missed


class Measured(Closed):
    """What was measured of an export over `steps` tokens in all of `prompts` texts: at each of them which token is the
    likeliest, at `whole_steps` of them whole distributions, for KL and perplexity.

    `exact` and `as_it_runs` compare with the package's weights under fp32 activations; `as_it_runs` is left out where
    the runtime rounds none. `as_scored` compares the export as it runs with the package as it was scored, each with its
    own rounding; it is told, and has no floor.
    """

    prompts: int
    steps: int
    whole_steps: int
    exact: Comparison
    exact_floors: Floors = Floors()
    rounding: Comparison  # the package as it was scored, from the same under fp32 activations
    as_it_runs: Comparison | None = None
    as_it_runs_floors: Floors | None = None
    as_scored: Comparison


class Verdict(Measured):
    """What was measured of an export, and the reasons against it; none means it is kept."""

    format: str
    digest: str
    runtime: str
    probe: str
    activations: str
    tensors_read_back: int
    read_back_error: float | None  # relative to the level
    max_read_back_error: float = MAX_READ_BACK_ERROR
    bytes: int
    package_bytes: int
    notes: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Tell whether nothing speaks against the export."""
        return not self.reasons


def measure(
    exact: PreTrainedModel,
    scored: PreTrainedModel,
    as_it_runs: Logits,
    in_fp32: Logits | None,
    probes: Probes,
    whole: NDArray[np.bool_] | None = None,
) -> Measured:
    """Measure a runtime against the packed model, teacher-forced over the probes. Both ways of the runtime and the
    packed model compute side by side.

    Args:
        exact: the package under fp32 activations.
        scored: the package as it was scored.
        as_it_runs: the runtime on the export.
        in_fp32: the runtime under fp32 activations; None if it rounds none anyway.
        whole: (width - 1,) the steps of a row at which the runtime gives whole distributions; elsewhere only its
            highest logit is looked at. None if everywhere.
    """
    whole = np.ones(probes.rows.shape[1] - 1, bool) if whole is None else whole
    runtimes, texts = [as_it_runs, *([] if in_fp32 is None else [in_fp32])], []
    with ThreadPoolExecutor(len(runtimes)) as threads:
        for index, row in enumerate(probes.rows):  # one at a time: a runtime may know no batches
            source = None if probes.sources is None else probes.sources[index]
            ids = [given.tolist() for given in (row[:-1], source) if given is not None]
            asked = [threads.submit(runtime, *ids) for runtime in runtimes]
            ours, packed = (_told(_torch_logits(model, row[:-1], source), whole) for model in (exact, scored))
            running, *exactly = (_told(each.result(), whole) for each in asked)
            like = exactly[0] if exactly else running
            pairs = (ours, like), (ours, packed), (ours, running), (packed, running)
            texts.append([_per_step(*pair, row[1:].numpy()[whole]) for pair in pairs])
    in_fp32_too, rounding, as_run, as_scored = (_comparison(of_texts) for of_texts in zip(*texts, strict=True))
    tokens = len(texts) * int(whole.sum())
    return Measured(
        prompts=len(texts),
        steps=len(texts) * len(whole),
        whole_steps=tokens,
        exact=in_fp32_too,
        rounding=rounding,
        as_it_runs=None if in_fp32 is None else as_run,
        as_it_runs_floors=None if in_fp32 is None else floors_as_it_runs(rounding, tokens),
        as_scored=as_scored,
    )


def floors_as_it_runs(rounding: Comparison, tokens: int) -> Floors:
    """Return the floors of a runtime that rounds activations, for a package whose own rounding costs that much, and
    perplexities of so many tokens: log(their ratio) is a mean over these of what varies by twice its KL where that is
    small."""
    allowed = max(0.0, min(rounding.kl_nats, MAX_ROUNDING_NATS))
    return Floors(
        max_kl_nats=MAX_KL_NATS + allowed,
        least_agreement=LEAST_AGREEMENT_ROUNDED,
        max_perplexity_change=MAX_PERPLEXITY_CHANGE + CHANCE * (2 * allowed / tokens) ** 0.5,
    )


def reasons_against(measured: Measured, read_back_error: float | None) -> tuple[str, ...]:
    """Return why an export cannot be kept."""
    reasons = [f"under fp32 activations {missed}" for missed in measured.exact_floors.missed_by(measured.exact)]
    if measured.as_it_runs is not None and measured.as_it_runs_floors is not None:
        reasons += [f"as it runs {missed}" for missed in measured.as_it_runs_floors.missed_by(measured.as_it_runs)]
    if read_back_error is not None and not read_back_error <= MAX_READ_BACK_ERROR:
        reasons.append(f"a tensor reads back {read_back_error:.2g} off its levels, more than the rounding of the scale")
    return tuple(reasons)


class _Told(NamedTuple):
    """What a model says of a text: the likeliest token at each step, and of whole steps (whole steps, vocabulary)."""

    likeliest: NDArray[np.int64]
    log_probs: LogProbs


def _told(values: NDArray[Any], whole: NDArray[np.bool_]) -> _Told:
    """Return what logits or log-probabilities (steps, vocabulary) say."""
    return _Told(values.argmax(axis=1), _log_softmax(values[whole]))


@torch.no_grad()
def _torch_logits(model: PreTrainedModel, ids: Tensor, source: Tensor | None) -> NDArray[np.float32]:
    given = {"input_ids": ids[None]}
    if source is not None:
        given = {"input_ids": source[None], "decoder_input_ids": ids[None]}
    logits: NDArray[np.float32] = model(**given).logits[0].numpy()
    return logits


def _per_step(reference: _Told, model: _Told, following: NDArray[np.int64]) -> tuple[NDArray[np.bool_], LogProbs]:
    """Return whether the likeliest token is the same at each step; and (3, whole steps): KL, log-probabilities of the
    token to come."""
    ours, theirs = reference.log_probs, model.log_probs
    with np.errstate(invalid="ignore"):  # an infinite one is refused by name
        kl = (np.exp(ours) * (ours - theirs)).sum(axis=1)
    places = np.arange(len(following)), following
    return reference.likeliest == model.likeliest, np.stack([kl, ours[places], theirs[places]])


def _comparison(texts: Sequence[tuple[NDArray[np.bool_], LogProbs]]) -> Comparison:
    same, numbers = (np.concatenate(of_texts, axis=-1) for of_texts in zip(*texts, strict=True))
    kl, reference, model = numbers.mean(axis=-1)
    perplexity, change = np.exp(-model), np.expm1(reference - model)
    return Comparison(kl_nats=kl, agreement=same.mean(), perplexity=perplexity, perplexity_change=change)


def _log_softmax(values: NDArray[Any]) -> LogProbs:
    """Return log-probabilities in fp64; those that are given stay as they are."""
    shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    normalized: LogProbs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def bytes_of(folder: Path) -> int:
    """Count the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
