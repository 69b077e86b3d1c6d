"""The one trainer: full-precision training and quantization-aware distillation, one worker or many.

What varies arrives as values: the recipe, and a `Distillation` or none. Batches are a function of (seed, step);
losses are sums divided by a count of the whole global batch; so worker count and micro-batch change float order
only. Checkpoints go through our own store rather than Ray's: they are fenced, hold no pickle, and are the same
with and without Ray.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

from pipeline.config.resources import Resources
from pipeline.config.training import Distill, Finetune
from pipeline.distill.random import draw
from pipeline.distill.transfer import sent
from pipeline.errors import BeginAgainError, RunError
from pipeline.models.compiled import compile_layers, compiled
from pipeline.models.hidden_states import WithStates, head_input, head_of, head_product
from pipeline.models.sharded import filled, give_parts, hollow, is_part, let_go, own, share_out, shares
from pipeline.models.student import load_parameters
from pipeline.quant.modules import quantizers
from pipeline.quant.quantizers.base import after_step
from pipeline.quant.stacks import Stacks, on_grid
from pipeline.store.records import Advance, Shard, TeacherCache, never
from pipeline.store.shards import Rows, Stored
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks.batch import Batch
from pipeline.tasks.chunks import Part, backward_by_parts, parts_of
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.losses import CONTRAST, DISTILLING, TEACHING, losses_of_logits, reference_nats
from pipeline.tasks.task import Task
from pipeline.training import checkpoints
from pipeline.training.checkpoints import CheckpointWriter, Progress, copied, under, weights
from pipeline.training.data_order import DataOrder, rank_rows
from pipeline.training.diagnostics import Watch, token_cosine
from pipeline.training.distillation import Distillation
from pipeline.training.optimizers import Optimizers
from pipeline.training.pace import Pace
from pipeline.training.read_ahead import ReadAhead

HISTORY_POINTS = 1000
EXPLODED = 3  # validations in a row that are worse than no training, after which it stops
DIAGNOSES = 50  # looks at the modules over a training job, about
READ_EVERY = {"cpu": 1, "cuda": 10}  # steps: a GPU that is asked for a loss waits until it has caught up


@dataclass(frozen=True)
class TrainingJob:
    """What every worker of a training job is told; small and picklable."""

    recipe: Finetune | Distill
    dir: StepDir
    tokens: StepDir
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    resources: Resources
    cache: FinishedStep[TeacherCache] | None = None
    task: Task = field(default_factory=LanguageModeling)

    @property
    def steps(self) -> int:
        """Count the optimizer steps."""
        return self.recipe.optimizer_steps(sum(shard.rows for shard in self.train))


class Trainer:
    """State of one worker of one training job. `ending` tells whether this worker is about to be ended."""

    def __init__(
        self,
        model: WithStates,
        job: TrainingJob,
        distillation: Distillation | None,
        device: torch.device,
        report: Advance,
        ending: Callable[[], bool] = never,
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.job, self.recipe, self.device, self.report = job, job.recipe, device, report
        # The workers' hosts, where workers themselves are joined by what takes a GPU's tensors alone.
        self.hosts = dist.new_group(backend="gloo") if self.world > 1 and device.type != "cpu" else None
        self.shared_out = shares(job.resources)
        self.whole = hollow(model.model) if self.shared_out else model.model  # what ends with the best weights
        self.distillation, self.model = distillation, share_out(model, device) if self.shared_out else model.to(device)
        if job.resources.activation_checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.head, self.vocabulary = head_of(model.model), int(model.model.config.vocab_size)
        # What is shared out is quantized where it is gathered.
        self.stacks, self._losses_of_logits = Stacks(nn.Module() if self.shared_out else model), losses_of_logits
        if job.resources.compiles(device):
            compile_layers(model.model)
            self.stacks, self._losses_of_logits = Stacks(model, compiled(on_grid)), compiled(losses_of_logits)
        self.optimizers = Optimizers(model, self.recipe)
        self.rows = ReadAhead(Rows(job.tokens, job.train, job.cache), device)
        self.validation = Rows(job.tokens, job.validation)
        self.eval_rows = torch.tensor(self.validation.drawn(self.recipe.eval_rows))
        self.order = DataOrder([shard.rows for shard in job.train], self.recipe.seed)
        self.progress, self.watch, self.pace = Progress(), Watch(), Pace()
        self.micro_batch = job.resources.micro_batch  # unless memory is too small
        self.best: dict[str, Tensor] = {}  # weights, on the host of rank 0
        self.writer, self.clock = CheckpointWriter(job.dir, device), time.monotonic
        self.kept_step, self.kept_s = 0, 0.0  # when the last checkpoint was made
        self.ending, self.announced = ending, False
        self.unread: list[dict[str, Tensor]] = []  # losses of the last steps, sums of this worker, on the device

    def run(self) -> Progress | None:
        """Train to the last step, resuming from the last checkpoint. On rank 0 the model ends with its best weights,
        and the progress is returned; other ranks return None."""
        self._resume()
        steps, step = self.job.steps, self.progress.step
        begins = [{"step": float(step), "begins": 1.0}] if self.rank == 0 else []  # however often it is begun again
        self.report(step, steps, "resumed" if step else "", begins)
        with contextlib.closing(self.rows), self.writer, self._memory_explained():
            if self.progress.best_step < 0 and self.distillation is not None:  # the student as it starts may be best
                self._validate()
                if self.rank == 0:
                    self.report(0, steps, "", list(self.progress.history))
            self.pace.restart()
            while self.progress.step < steps:
                self.unread.append(self.train_step(self.progress.step))
                self.progress.step += 1
                self._after_step(steps)
        if self.rank != 0:
            return None
        if self.shared_out:
            self.model.model = filled(self.whole, self.best)
        else:
            load_parameters(self.model.model, self.best)
        return self.progress

    def train_step(self, step: int) -> dict[str, Tensor]:
        """Take one optimizer step over one global batch; return the mean losses in nats, of this worker's part."""
        if self.distillation is not None and self.distillation.recipe.fade_in > 0:
            faded_in = min(1.0, step / (self.distillation.recipe.fade_in * self.job.steps))
            for _, _, quantizer in quantizers(self.model):
                quantizer.blend = faded_in
        losses = self._backward_in_memory(step)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.optimizers.clipped, self.recipe.clip_norm)
        self.optimizers.step(step, self.job.steps)
        after_step((q, weight, self.optimizers.second_moment(weight)) for _, weight, q in quantizers(self.model))
        if self.distillation is not None and self.distillation.recipe.contrast_weight > 0:
            self.distillation.bank.update(self._gather)
        return losses

    def _refuse_divergence(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            self._stop(f"The {what} is {value} at step {step}")

    def _stop(self, why: str) -> None:
        """Raise RunError with the knobs, once what is being stored is."""
        self.writer.wait()
        raise RunError(f"{why}. Lower the learning rate (lr is {self.recipe.lr}), or use precision: fp32. {self._kept}")

    @property
    def _kept(self) -> str:
        step = self.kept_step
        return f"The last checkpoint, of step {step}, is kept." if step else "There was no checkpoint yet."

    def _backward_in_memory(self, step: int) -> dict[str, Tensor]:
        """Do what `backward` does, with as many rows at once as memory holds: where it is too small for them, half."""
        while True:
            try:
                return self.backward(step)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            given, fits = self.job.resources.micro_batch, self.micro_batch // 2
            checkpoints.note_micro_batch(self.job.dir, given, fits)
            if self.world > 1:  # the others wait for gradients of this one
                raise BeginAgainError(f"memory is too small for micro_batch {self.micro_batch}; next is {fits}")
            self._take_micro_batch(fits)
            if self.distillation is not None:
                self.distillation.bank.forget()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_micro_batch(self, rows: int) -> None:
        """Pass so many rows at once from here on, and say so."""
        self.micro_batch = rows
        self._note("micro_batch", rows, "as memory allows")

    def _note(self, knob: str, value: int, why: str) -> None:
        """Say what changes from here on where all can read it: in the record's history."""
        point = {"step": float(self.progress.step), knob: float(value)}
        self.progress.history.append(point)
        if self.rank == 0:
            self.report(self.progress.step, self.job.steps, f"{knob} is {value} from here on, {why}", [point])

    @contextlib.contextmanager
    def _memory_explained(self) -> Iterator[None]:
        """Say which knobs there are where memory is too small even so."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            resources = self.job.resources
            checkpointing = "" if resources.activation_checkpointing else ", or set activation_checkpointing: true"
            raise RunError(
                f"Memory is too small at step {self.progress.step}: {str(error).splitlines()[0]} Training passed rows "
                f"{self.micro_batch} at a time (resources.micro_batch is {resources.micro_batch}), validation "
                f"{resources.inference_batch}. Lower resources.micro_batch or resources.inference_batch, at least 1 "
                f"each{checkpointing}. {self._kept}"
            ) from error

    def backward(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of one global batch, micro-batch by micro-batch; return what this worker adds to the
        mean losses, on the device."""
        self.model.train()
        self.optimizers.zero_grad()
        micros = self._micro_batches(step)
        lengths = self.rows.lengths([row for micro in micros for row in micro]).numpy()
        self.pace.steps, self.pace.tokens = self.pace.steps + 1, self.pace.tokens + int(lengths.sum()) * self.world
        counted = self.job.task.counts(lengths)
        names = [name for name in (TEACHING if self.distillation is None else DISTILLING) if name in counted]
        counts = self._all_reduce(torch.tensor([counted[name] for name in names], dtype=torch.float64))
        weights = sent(torch.tensor([self._weight(name) for name in names], dtype=torch.float64), self.device)
        shares = dict(zip(names, weights / counts, strict=True))
        sums: list[Tensor] = []
        with self.stacks.quantized_once():
            for micro, then in zip(micros, [*micros[1:], *self._micro_batches(step + 1)[:1]], strict=True):
                # Dropout depends on the place in the batch, not on what was drawn before: resuming needs no state.
                torch.manual_seed(draw("dropout", self.recipe.seed, step, micro[0]).initial_seed())
                losses = self._backward(step, micro, then, shares)
                sums += [losses[name] for name in names]
        means = torch.stack(sums).view(-1, len(names)).sum(0) / counts
        self._sum_gradients()
        return {"loss": (weights * means).sum(), **(dict(zip(names, means, strict=True)) if len(names) > 1 else {})}

    def _weight(self, loss: str) -> float:
        return self.distillation.recipe.contrast_weight if loss == CONTRAST and self.distillation is not None else 1.0

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Return the rows of a step that are this worker's, as many at a time as go through the model at once."""
        rows = rank_rows(self.order.batch(step, self.recipe.batch_size), self.rank, self.world)
        return [micro.tolist() for micro in rows.split(self.micro_batch)]

    def _backward(
        self, step: int, row_ids: list[int], then: Sequence[int], shares: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; return its losses by name, each a sum in nats. Rows of the next one are
        read meanwhile."""
        batch, cached = self._read(*row_ids, then=then)
        distillation, bf16 = self.distillation, self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            last, states = self.model(*batch.inputs)
        taught = None if distillation is None else distillation.taught(batch, cached)

        def of_part(prepared: Tensor, part: Batch, at: Part) -> dict[str, Tensor]:
            teacher = None if distillation is None or taught is None else (distillation.head, taught[0][at])
            return self._losses_of_logits(self.head, prepared, part, teacher, bf16)

        losses, prepared, gradient = backward_by_parts(self.head, self.vocabulary, last, batch, of_part, shares)
        ends = {prepared: gradient}
        if distillation is not None and taught is not None:
            if distillation.recipe.contrast_weight:
                rows = self.order.batch(step, self.recipe.batch_size)
                contrast = distillation.contrast(step, rows, row_ids, batch, taught[1], states, self._read)
                ends[contrast], losses[CONTRAST] = shares[CONTRAST], contrast.detach()
            else:
                losses[CONTRAST] = states.new_zeros((), dtype=torch.float64)
        torch.autograd.backward([*ends], [*ends.values()])
        return losses

    def _read(self, *row_ids: int, then: Sequence[int] = ()) -> tuple[Batch, Stored | None]:
        begun = time.perf_counter()
        ids, lengths, cached = self.rows.get(row_ids, then)
        self.pace.waited_s += time.perf_counter() - begun
        return self.job.task.batch(ids, lengths).to(self.device), cached

    def _after_step(self, steps: int) -> None:
        progress, step = self.progress, self.progress.step
        validates = step == steps or step % self.recipe.eval_every == 0
        if not validates and len(self.unread) < READ_EVERY[self.device.type]:
            return
        known = len(progress.history)
        loss, due, ending = self._read_losses(steps)
        note, pace = f"loss {loss:.3f}", self.pace.point(step)
        if validates:
            note += f", validation perplexity {math.exp(min(self._validate(), 700)):.2f}"
        announced, self.announced = ending and not self.announced and step < steps, ending
        # What has exploded takes no good checkpoint's place.
        if (announced or (due and step < steps)) and not progress.exploded(self.vocabulary):
            self._keep()
            if announced:
                self.writer.wait()
                note += ", checkpoint before the end that was announced"
        self.writer.look()
        if self.rank == 0:
            self.report(step, steps, note, [*progress.history[known:], pace])
        self.pace.restart()

    def _keep(self) -> None:
        """Make a checkpoint, which is stored while training goes on."""
        tensors = self._tensors()
        moving = [own(t) for name, t in tensors.items() if t.is_floating_point() and not name.startswith("best.")]
        size = self._all_reduce(get_total_norm(moving))
        self._refuse_divergence(float(size), "norm of what a checkpoint holds", self.progress.step)
        self.kept_step, self.kept_s = self.progress.step, self.clock()
        if self.rank == 0:
            self.writer.begin(tensors, self.progress)
        else:
            give_parts(tensors.values())

    def _read_losses(self, steps: int) -> tuple[float, bool, bool]:
        """Take the losses of the steps since the last time into the history; return the last one, and what the workers
        agree upon: whether a checkpoint is due by the clock of rank 0, and whether any of them is about to be ended.
        Raises RunError for a loss that is no number."""
        names = list(self.unread[0])
        sums = torch.stack([torch.stack(list(losses.values())) for losses in self.unread])
        first = self.progress.step - len(self.unread)
        self.unread.clear()
        due = self.rank == 0 and self.clock() - self.kept_s >= 60 * self.job.resources.checkpoint_minutes
        flags = sent(torch.tensor([due, self.ending()], dtype=sums.dtype), self.device)
        *losses, due, ending = self._all_reduce(torch.cat([sums.flatten(), flags])).tolist()
        rows = [losses[start : start + len(names)] for start in range(0, len(losses), len(names))]
        for step, row in enumerate(rows, first):
            self._refuse_divergence(row[0], "loss", step)
            if step + 1 == steps or (step + 1) % max(1, steps // HISTORY_POINTS) == 0:
                self.progress.history.append({"step": step + 1, **dict(zip(names, row, strict=True))})
        return rows[-1][0], due > 0, ending > 0

    def _validate(self) -> float:
        """Score the validation split, write it down, and keep the weights if they are the best so far."""
        progress, step = self.progress, self.progress.step
        nats, cosine = self.validate()
        self._refuse_divergence(nats, "validation loss", step)
        entry = {"step": step, "validation_nats": nats}
        if self.distillation is not None:
            entry["token_cosine"] = cosine
            due = step == self.job.steps or step - self.watch.step >= self.job.steps / DIAGNOSES
            if due and self.rank == 0:
                progress.modules.append({"step": step, "modules": self.watch.look(self.model.model, step)})
            elif due:
                self.watch.step = step
                give_parts(weight for _, weight, _ in quantizers(self.model.model))
        progress.history.append(entry)
        if (validations := progress.exploded(self.vocabulary)) >= EXPLODED:
            self._stop(
                f"The validation loss is {nats:.2f} at step {step}, {validations} times in a row worse than that of a "
                "guess among all tokens, and than the first one was"
            )
        if nats < progress.best_nats:
            progress.best_step, progress.best_nats = step, nats
            if self.rank == 0:
                self.best, _ = copied(weights(self.model), self.device)
            else:
                give_parts(weights(self.model).values())
        return nats

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Return the mean next-token nats over `eval_rows` rows of the validation split, the same at every validation,
        and the mean cosine between the last states of different tokens of a row, whichever layer's are contrasted."""
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        size, scored = self.job.resources.inference_batch, rank_rows(self.eval_rows, self.rank, self.world)
        for first in range(0, len(rank_rows(self.eval_rows, 0, self.world)), size):  # of the most that a worker has
            micro = scored[first : first + size]
            # One that has no more passes a row that counts for nothing, where others wait for its parts.
            if len(micro) or self.shared_out:
                rows = micro if len(micro) else self.eval_rows[:1]
                batch = self.job.task.batch(*self.validation.get(rows.tolist())[:2]).to(self.device).references()
                states, _ = self.model(*batch.inputs)
            if len(micro):
                prepared = head_input(self.head, states)
                for part in parts_of(batch, self.vocabulary):
                    nats = reference_nats(head_product(self.head, prepared[part]), batch.part(*part))
                    sums[:2] += torch.stack([value.double() for value in nats])
                sums[2:] += torch.stack([value.double() for value in token_cosine(states, batch.valid)])
        let_go(self.model)
        nats, tokens, cosine, rows_of_two = self._all_reduce(sums).tolist()
        return nats / tokens, cosine / max(1.0, rows_of_two)

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on, and the best weights so far."""
        tensors = {f"model.{name}": parameter for name, parameter in weights(self.model).items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizers.tensors().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.distillation is not None:
            tensors |= {f"bank.{name}": tensor for name, tensor in self.distillation.bank.state_dict().items()}
            tensors |= {f"codes.{name}": tensor for name, tensor in self.watch.codes.items()}
        return tensors

    def _resume(self) -> None:
        begin: list[Any] = [None, self.micro_batch]
        if self.rank == 0:
            fits = checkpoints.noted_micro_batch(self.job.dir, self.micro_batch)
            begin = [checkpoints.latest_checkpoint(self.job.dir), fits]
        if self.world > 1:  # rank 0 chooses, so that all go on from the same step
            dist.broadcast_object_list(begin)
        newest, fits = begin
        if newest is not None:
            tensors, self.progress = checkpoints.load_checkpoint(self.job.dir, newest)
            load_parameters(self.model.model, under("model.", tensors))
            self.optimizers.load(under("optimizer.", tensors))
            if self.distillation is not None:
                self.distillation.bank.load_state_dict(under("bank.", tensors))
            if self.rank == 0:
                self.watch.codes, self.best = under("codes.", tensors), under("best.", tensors)
            if self.progress.modules:
                self.watch.step = self.progress.modules[-1]["step"]
            self.micro_batch = next(
                (int(p["micro_batch"]) for p in self.progress.history[::-1] if "micro_batch" in p), self.micro_batch
            )
        if fits != self.micro_batch:
            self._take_micro_batch(fits)
        if self.world != (self.progress.workers or self.job.resources.workers or 1):
            self._note("workers", self.world, "as many as there are")
        self.progress.workers = self.world
        self.kept_step, self.kept_s = self.progress.step, self.clock()
        self._barrier()

    def _sum_gradients(self) -> None:
        """Add up the gradients of all workers, whose losses are parts of one mean, in one exchange. Those of
        parameters that are shared out were added up as they were made."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None and not is_part(p)]
        if self.world > 1 and gradients:
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers, on the device."""
        moved = tensor if tensor.device == self.device else sent(tensor, self.device)
        if self.world > 1:
            dist.all_reduce(moved)
        return moved

    def _gather(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Return each tensor of every rank, in rank order, where it is. Those of a rank have one length, which hosts
        tell each other: none waits for its device to know it."""
        if self.world == 1:
            return [[tensor] for tensor in tensors]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(tensors[0])]), self.hosts)
        return [self._gathered(tensor, [*map(int, lengths)]) for tensor in tensors]

    def _gathered(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return a tensor of every rank, in rank order; ranks have so many rows."""
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded, self.hosts if tensor.device.type == "cpu" else None)
        return [rows[:length] for rows, length in zip(gathered, lengths, strict=True)]

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
