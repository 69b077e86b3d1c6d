"""Scores of a model and its teacher over splits of text, shards side by side, by the task's one protocol.

A document of running text ends with end-of-text, and goes on from row to row and from shard to shard; the first token
of a block is context only and counts nothing. Elsewhere a row is a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config.base import Closed
from pipeline.config.data import Evaluate
from pipeline.models.build import load_model
from pipeline.models.device import device_for
from pipeline.stages.stage import PinnedRun, Step, StepJob
from pipeline.store.pieces import Pieces
from pipeline.store.records import Shard, SplitName, Teacher, Tokens
from pipeline.store.shards import Rows
from pipeline.tasks.samples import samples
from pipeline.tasks.scoring import Scores
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPANS_A_WORKER = 4  # so that none waits long for another
BATCH = "batch"  # in a recipe: rows of a pass, where they show
TENSOR_RANGE_ROWS = 16  # of a pass where a range spans the batch; being in the recipe, it is no setting of resources

Part = tuple[SplitName, int, Shard]  # a shard of a split behind so many rows
Span = tuple[Part, ...]
Opens = Callable[[StepJob], "PreTrainedModel"]  # the model that is scored, on the CPU


class Piece(Closed):
    """The result of one shard of a split: the sums of `Scores`; with the first shard, what the model writes."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    samples: str = ""


@dataclass(frozen=True)
class Scored:
    """The scores of the model and its teacher by split, and what the model wrote of a few rows of the first."""

    student: dict[SplitName, Scores]
    teacher: dict[SplitName, Scores]
    samples: str


def scoring_recipe(run: PinnedRun) -> dict[str, Any]:
    """Return how scores are taken. Only with one activation range a tensor does the batch show in them."""
    batch = {BATCH: TENSOR_RANGE_ROWS} if run.config.quant.activation_range == "tensor" else {}
    return {"protocol": run.task.protocol, **run.task.scoring(run.config.evaluate), **batch}


def score_splits(step: Step, origin: str, opens: Opens, splits: Sequence[SplitName]) -> Scored:
    """Score every shard of the splits of the step's tokens beside its teacher; `origin` tells the weights apart of
    which an earlier attempt left scores."""
    parts = [part for split in splits for part in parts_of(split, step.input(Tokens).record.splits[split].shards)]
    spans = spans_of(parts, SPANS_A_WORKER * max(1, step.resources.workers))
    work = [partial(_score, step.job, origin, opens, tuple(splits), span) for span in spans]
    pieces = [
        Piece.model_validate_json(line)
        for lines in step.engine.tasks(work, step.dir, step.advance, step.resources.gpus_per_worker)
        for line in lines
    ]
    ours, theirs = {split: Scores() for split in splits}, {split: Scores() for split in splits}
    for (split, _, _), piece in zip(parts, pieces, strict=True):
        ours[split] += Scores(**piece.student)
        theirs[split] += Scores(**piece.teacher)
    return Scored(ours, theirs, pieces[0].samples)


def parts_of(split: SplitName, shards: Sequence[Shard]) -> list[Part]:
    """Return the shards of a split, each with the rows before it."""
    before = accumulate((shard.rows for shard in shards), initial=0)
    return [(split, rows, shard) for rows, shard in zip(before, shards, strict=False)]


def spans_of(parts: Sequence[Part], most: int) -> list[Span]:
    """Cut the parts into at most so many spans of about equal length."""
    length = -(-len(parts) // most)
    return [tuple(parts[start : start + length]) for start in range(0, len(parts), length)]


def _score(job: StepJob, origin: str, opens: Opens, splits: Sequence[SplitName], span: Span) -> list[str]:
    """Return a `Piece` of each shard as JSON; those that an earlier attempt left, of the same weights, are not made
    again."""
    made, pieces = Pieces(job.dir, f"attempt/{origin}/"), []
    scorer = None
    for part in span:
        _, _, shard = part
        name = Path(shard.name).stem
        piece = made.get(name, Piece.model_validate)
        if piece is None:
            scorer = scorer or Scorer(job, opens, splits)
            piece = scorer.score(*part)
            made.put(name, piece.model_dump())
        pieces.append(piece.model_dump_json())
    return pieces


class Scorer:
    """A model and its teacher in one process, on a GPU if workers have one."""

    def __init__(self, job: StepJob, opens: Opens, splits: Sequence[SplitName]) -> None:
        self.tokens, self.task = job.input(Tokens), job.task
        self.evaluate = Evaluate.model_validate(job.recipe.get("evaluate", {}))
        self.batch: int = job.recipe.get(BATCH, job.resources.inference_batch)  # rows of a pass
        device = device_for(job.resources)
        self.student = opens(job).to(device)
        self.teacher = load_model(job.input(Teacher).folder()).to(device).eval()
        self.words = read_tokenizer(self.tokens.folder())
        self.first = splits[0]
        self.rows = {split: Rows(self.tokens.dir, self.tokens.record.splits[split].shards) for split in splits}
        most = self.evaluate.generated_rows  # of each split, for which the model generates
        self.generated = {split: None if most is None else rows.drawn(most) for split, rows in self.rows.items()}

    def score(self, split: SplitName, before: int, shard: Shard) -> Piece:
        """Score a shard of a split; `before` counts the split's rows before it."""
        drawn = self.generated[split]
        generated = None if drawn is None else {row - before for row in drawn}
        rows = batches(Rows(self.tokens.dir, (shard,)), self.batch)
        ours, theirs = self.task.score(rows, self.student, self.teacher, self.words, self.evaluate, generated)
        wanted = (split, before) == (self.first, 0) and "validation" in self.rows
        text = samples(self.student, self.words, self.task, self.rows["validation"]) if wanted else ""
        return Piece(student=asdict(ours), teacher=asdict(theirs), samples=text)


def batches(rows: Rows, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all rows in order, ids and lengths."""
    for start in range(0, rows.rows, batch):
        ids, lengths, _ = rows.get(range(start, min(start + batch, rows.rows)))
        yield ids, lengths
