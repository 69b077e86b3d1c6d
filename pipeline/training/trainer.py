"""The one trainer: full-precision training and quantization-aware distillation, one worker or many.

What varies arrives as values: the recipe, and a `Distillation` or none. Batches are a function of (seed, step);
losses are sums divided by a count of the whole global batch; so worker count and micro-batch change float order
only. Checkpoints go through our own store rather than Ray's: they are fenced, hold no pickle, and are the same
with and without Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pipeline.config.resources import Resources
from pipeline.config.training import Distill, Finetune
from pipeline.distill.random import draw
from pipeline.distill.transfer import sent
from pipeline.errors import RunError
from pipeline.models.compiled import compile_layers, compiled
from pipeline.models.hidden_states import WithStates, head_input, head_of, head_product, last_states
from pipeline.models.student import load_parameters
from pipeline.quant.modules import quantizers
from pipeline.quant.quantizers.base import after_step
from pipeline.quant.stacks import Stacks, on_grid
from pipeline.store.records import Advance, Shard, StoredFile, TeacherCache
from pipeline.store.shards import Rows, StoredStates
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks.batch import Batch
from pipeline.tasks.chunks import Part, backward_by_parts, parts_of
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.losses import CONTRAST, DISTILLING, TEACHING, losses_of_logits, reference_nats
from pipeline.tasks.task import Task
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Progress, under, weights
from pipeline.training.data_order import DataOrder, rank_rows
from pipeline.training.diagnostics import Watch, token_cosine
from pipeline.training.distillation import Distillation
from pipeline.training.optimizers import Optimizers
from pipeline.training.pace import Pace
from pipeline.training.read_ahead import ReadAhead

HISTORY_POINTS = 1000
DIAGNOSES = 50  # looks at the modules over a training job, about
READ_EVERY = 10  # steps: a GPU that is asked for a loss waits until it has caught up


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
        """Count the optimizer steps; epochs count rows of the training split."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        rows = sum(shard.rows for shard in self.train)
        return max(1, math.ceil((self.recipe.epochs or 0) * rows / self.recipe.batch_size))


def train(
    model: WithStates, job: TrainingJob, distillation: Distillation | None, device: torch.device, report: Advance
) -> Progress | None:
    """Train to the last step, resuming from the last checkpoint. On rank 0, `model` ends with its best weights and
    the progress is returned; other ranks return None."""
    trainer = Trainer(model, job, distillation, device, report)
    trainer.run()
    return trainer.progress if trainer.rank == 0 else None


class Trainer:
    """State of one worker of one training job."""

    def __init__(
        self,
        model: WithStates,
        job: TrainingJob,
        distillation: Distillation | None,
        device: torch.device,
        report: Advance,
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.job, self.recipe, self.device, self.report = job, job.recipe, device, report
        self.distillation, self.model = distillation, model.to(device)
        if job.resources.activation_checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.head, self.vocabulary = head_of(model.model), int(model.model.config.vocab_size)
        self.stacks, self._losses_of_logits = Stacks(model), losses_of_logits
        if job.resources.compiles(device):
            compile_layers(model.model)
            self.stacks, self._losses_of_logits = Stacks(model, compiled(on_grid)), compiled(losses_of_logits)
        self.optimizers = Optimizers(model, self.recipe)
        self.rows = ReadAhead(Rows(job.tokens, job.train, job.cache), device)
        self.validation = Rows(job.tokens, job.validation)
        self.eval_rows = torch.tensor(self.validation.drawn(self.recipe.eval_rows))
        self.order = DataOrder([shard.rows for shard in job.train], self.recipe.seed)
        self.progress, self.watch, self.pace = Progress(), Watch(), Pace()
        self.unread: list[dict[str, Tensor]] = []  # losses of the last steps, sums of this worker, on the device

    def run(self) -> None:
        """Train as `train` does."""
        self._resume()
        steps = self.job.steps
        self.report(self.progress.step, steps, "resumed" if self.progress.step else "")
        if self.progress.best_step < 0 and self.distillation is not None:  # the student as it starts may be the best
            self._validate()
            if self.rank == 0:
                self.report(0, steps, "", list(self.progress.history))
        self.pace.restart()
        try:
            while self.progress.step < steps:
                self.unread.append(self.train_step(self.progress.step))
                self.progress.step += 1
                self._after_step(steps)
        finally:
            self.rows.close()
        if self.rank == 0:
            best = self.job.dir.local(self.progress.best_file, StoredFile(**self.progress.best_stored))
            load_parameters(self.model.model, load_file(best))

    def train_step(self, step: int) -> dict[str, Tensor]:
        """Take one optimizer step over one global batch; return the mean losses in nats, of this worker's part."""
        if self.distillation is not None and self.distillation.recipe.fade_in > 0:
            faded_in = min(1.0, step / (self.distillation.recipe.fade_in * self.job.steps))
            for _, _, quantizer in quantizers(self.model):
                quantizer.blend = faded_in
        losses = self.backward(step)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.optimizers.clipped, self.recipe.clip_norm)
        self.optimizers.step(step, self.job.steps)
        after_step((q, weight, self.optimizers.second_moment(weight)) for _, weight, q in quantizers(self.model))
        if self.distillation is not None and self.distillation.recipe.contrast_weight > 0:
            self.distillation.bank.update(self._gather)
        return losses

    def _refuse_divergence(self, nats: float, what: str, step: int) -> None:
        if not math.isfinite(nats):
            raise RunError(
                f"The {what} is {nats} at step {step}. Lower the learning rate (lr is {self.recipe.lr}), or "
                "use precision: fp32. The last checkpoint is kept."
            )

    def backward(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of one global batch, micro-batch by micro-batch; return what this worker adds to the
        mean losses, on the device."""
        self.model.train()
        self.optimizers.zero_grad()
        micros = self._micro_batches(step)
        lengths = self.rows.lengths([row for micro in micros for row in micro])
        self.pace.steps, self.pace.tokens = self.pace.steps + 1, self.pace.tokens + int(lengths.sum()) * self.world
        counted = self.job.task.counts(lengths)
        names = [name for name in (TEACHING if self.distillation is None else DISTILLING) if name in counted]
        counts = self._all_reduce(torch.tensor([counted[name] for name in names], dtype=torch.float64))
        weights = sent(torch.tensor([self._weight(name) for name in names], dtype=torch.float64), self.device)
        shares = dict(zip(names, weights / counts, strict=True))
        means = torch.zeros_like(counts)
        with self.stacks.quantized_once():
            for micro, then in zip(micros, [*micros[1:], *self._micro_batches(step + 1)[:1]], strict=True):
                # Dropout depends on the place in the batch, not on what was drawn before: resuming needs no state.
                torch.manual_seed(draw("dropout", self.recipe.seed, step, micro[0]).initial_seed())
                losses = self._backward(step, micro, then, shares)
                means += torch.stack([losses[name] for name in names]) / counts
        self._sum_gradients()
        return {"loss": (weights * means).sum(), **(dict(zip(names, means, strict=True)) if len(names) > 1 else {})}

    def _weight(self, loss: str) -> float:
        return self.distillation.recipe.contrast_weight if loss == CONTRAST and self.distillation is not None else 1.0

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Return the rows of a step that are this worker's, as many at a time as go through the model at once."""
        rows = rank_rows(self.order.batch(step, self.recipe.batch_size), self.rank, self.world)
        return [micro.tolist() for micro in rows.split(self.job.resources.micro_batch)]

    def _backward(
        self, step: int, row_ids: list[int], then: Sequence[int], shares: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; return its losses by name, each a sum in nats. Rows of the next one are
        read meanwhile."""
        batch, cached = self._read(*row_ids, then=then)
        distillation, bf16 = self.distillation, self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            last, states = self.model(*batch.inputs)
            taught = None if distillation is None else distillation.teacher_states(batch, cached)

        def of_part(prepared: Tensor, part: Batch, at: Part) -> dict[str, Tensor]:
            teacher = None if distillation is None or taught is None else (distillation.head, taught[0][at])
            return self._losses_of_logits(self.head, prepared, part, teacher, bf16)

        losses, prepared, gradient = backward_by_parts(self.head, self.vocabulary, last, batch, of_part, shares)
        ends = {prepared: gradient}
        if distillation is not None and taught is not None:
            losses[CONTRAST] = states.new_zeros((), dtype=torch.float64)
            if distillation.recipe.contrast_weight:
                rows = self.order.batch(step, self.recipe.batch_size)
                contrast = distillation.contrast(step, rows, row_ids, batch, taught[1], states, self._read)
                ends[contrast], losses[CONTRAST] = shares[CONTRAST], contrast.detach()
        torch.autograd.backward([*ends], [*ends.values()])
        return losses

    def _read(self, *row_ids: int, then: Sequence[int] = ()) -> tuple[Batch, StoredStates | None]:
        begun = time.perf_counter()
        ids, lengths, states = self.rows.get(row_ids, then)
        self.pace.waited_s += time.perf_counter() - begun
        return self.job.task.batch(ids, lengths).to(self.device), states

    def _after_step(self, steps: int) -> None:
        progress, step = self.progress, self.progress.step
        validates = step == steps or step % self.recipe.eval_every == 0
        keeps = validates or step % self.job.resources.checkpoint_steps == 0
        if not keeps and len(self.unread) < READ_EVERY:
            return
        known = len(progress.history)
        note = f"loss {self._read_losses(steps):.3f}"
        pace = self.pace.point(step)
        if validates:
            note += f", validation perplexity {math.exp(min(self._validate(), 700)):.2f}"
        if keeps:
            if self.rank == 0:
                checkpoints.write_checkpoint(self.job.dir, self._tensors(), progress)
            self._barrier()
        if self.rank == 0:
            self.report(step, steps, note, [*progress.history[known:], pace])
        self.pace.restart()

    def _read_losses(self, steps: int) -> float:
        """Take the losses of the steps since the last time into the history; return the last one. Raises RunError for
        one that is no number."""
        names = list(self.unread[0])
        sums = torch.stack([torch.stack(list(losses.values())) for losses in self.unread])
        first = self.progress.step - len(self.unread)
        self.unread.clear()
        rows = self._all_reduce(sums).tolist()
        for step, row in enumerate(rows, first):
            self._refuse_divergence(row[0], "loss", step)
            if step + 1 == steps or (step + 1) % max(1, steps // HISTORY_POINTS) == 0:
                self.progress.history.append({"step": step + 1, **dict(zip(names, row, strict=True))})
        return float(rows[-1][0])

    def _validate(self) -> float:
        """Score the validation split, write it down, and keep the weights if they are the best so far."""
        progress, step = self.progress, self.progress.step
        nats, cosine = self.validate()
        self._refuse_divergence(nats, "validation loss", step)
        entry = {"step": step, "validation_nats": nats}
        if self.distillation is not None:
            entry["token_cosine"] = cosine
            apart = self.job.steps / DIAGNOSES
            if self.rank == 0 and (step == self.job.steps or step - self.watch.step >= apart or not self.watch.codes):
                progress.modules.append({"step": step, "modules": self.watch.look(self.model.model, step)})
        progress.history.append(entry)
        if nats < progress.best_nats:
            progress.best_step, progress.best_nats = step, nats
            progress.best_file = f"attempt/best-{step}.safetensors"
            if self.rank == 0:
                stored = checkpoints.store_tensors(self.job.dir, progress.best_file, weights(self.model))
                progress.best_stored = stored.model_dump()
        return nats

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Return the mean next-token nats over `eval_rows` rows of the validation split, the same at every validation,
        and the mean cosine between the last states of different tokens of a row, whichever layer's are contrasted."""
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for micro in rank_rows(self.eval_rows, self.rank, self.world).split(self.job.resources.inference_batch):
            if len(micro):
                batch = self.job.task.batch(*self.validation.get(micro.tolist())[:2]).to(self.device).references()
                states = last_states(self.model.model, *batch.inputs)
                prepared = head_input(self.head, states)
                for part in parts_of(batch, self.vocabulary):
                    nats = reference_nats(head_product(self.head, prepared[part]), batch.part(*part))
                    sums[:2] += torch.stack([value.double() for value in nats])
                sums[2:] += torch.stack([value.double() for value in token_cosine(states, batch.valid)])
        nats, tokens, cosine, rows_of_two = self._all_reduce(sums).tolist()
        return nats / tokens, cosine / max(1.0, rows_of_two)

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on."""
        tensors = {f"model.{name}": parameter for name, parameter in weights(self.model).items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizers.tensors().items()}
        if self.distillation is not None:
            tensors |= {f"bank.{name}": tensor for name, tensor in self.distillation.bank.state_dict().items()}
            tensors |= {f"codes.{name}": tensor for name, tensor in self.watch.codes.items()}
        return tensors

    def _resume(self) -> None:
        newest = [checkpoints.latest_checkpoint(self.job.dir) if self.rank == 0 else None]
        if self.world > 1:  # rank 0 chooses, so that all go on from the same step
            dist.broadcast_object_list(newest)
        if newest[0] is not None:
            tensors, self.progress = checkpoints.load_checkpoint(self.job.dir, newest[0])
            load_parameters(self.model.model, under("model.", tensors))
            self.optimizers.load(under("optimizer.", tensors))
            if self.distillation is not None:
                self.distillation.bank.load_state_dict(under("bank.", tensors))
            self.watch.codes = under("codes.", tensors)
            self.watch.step = self.progress.modules[-1]["step"] if self.progress.modules else 0
        self._barrier()

    def _sum_gradients(self) -> None:
        """Add up the gradients of all workers, whose losses are parts of one mean, in one exchange."""
        if self.world > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers, on the device."""
        moved = tensor if tensor.device == self.device else sent(tensor, self.device)
        if self.world > 1:
            dist.all_reduce(moved)
        return moved

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Return a tensor of every rank, in rank order, where it is; the first dimensions may differ."""
        if self.world == 1:
            return [tensor]
        own = tensor.to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return [rows[: int(size)].to(tensor.device) for rows, size in zip(gathered, sizes, strict=True)]

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
