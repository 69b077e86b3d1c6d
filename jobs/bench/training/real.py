"""`bitmill bench real`: a real model, fine-tuned and then compressed by every preset, under a budget of minutes.

Everything lies in one folder. A row whose result is there is not run again, and one that was stopped goes on from its
last checkpoint, with as many steps as were planned for it: the folder can be carried to another machine in between.
What it takes to make a row ready, compilation above all, comes beside the minutes: it is the same for a short run as
for a long one.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from jobs.bench.documents import Documents, bootstrapped
from jobs.bench.rows import REFERENCE, named
from jobs.bench.training.held import OwnStore, resources_for
from jobs.bench.training.measures import described, seconds_a_step, wait
from jobs.display import print_table
from pipeline.config.data import Evaluate
from pipeline.config.load import load_fields
from pipeline.config.presets import PRESETS, suited
from pipeline.config.quant import Quant
from pipeline.config.training import Distill, Finetune
from pipeline.errors import ConfigError, RunError
from pipeline.metrics import gap_nats
from pipeline.models.build import fp32_bytes, keep_all_layers, load_model, parameters, read_config, set_dropout
from pipeline.models.family import family_for, family_named
from pipeline.models.hidden_states import WithStates
from pipeline.models.student import freeze_student, restore_frozen
from pipeline.package.codec import encode
from pipeline.sources.models import ModelSource
from pipeline.stages import distill as distill_stage
from pipeline.stages.scorer import batches
from pipeline.store.records import SplitName, Tokens
from pipeline.store.shards import Rows
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks import task_of
from pipeline.tasks.scoring import Scores
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.training.checkpoints import write_checkpoint
from pipeline.training.trainer import Trainer, TrainingJob

FINETUNE = "finetune"
FINETUNE_SHARE = 0.12  # of the time, at most
FINETUNE_EPOCHS = 2.0  # at most: beyond them a small text is learned by heart
FINETUNE_LEAST = 50  # steps, whatever they take: below them it is no teacher of the text
WARM_UP, TIMED = 4, 8  # steps before a row begins, of which the weights keep nothing
GUESSED_STEPS = 1000  # that those steps are taken for: the first while quantization fades in, the timed ones at the end
VALIDATIONS = 2  # of a row, beside the one at its start
KEEP_S = 120.0  # of training between two checkpoints
DECIDED = ("steps", "epochs", "batch_size", "precision", "eval_every", "start")
SCORED: tuple[SplitName, ...] = ("validation", "test")
HEADER = ("row", "tokens", "seconds", "tokens/s", "teacher", "student", "gap, nats", "KL", "same top token", "MiB")
MIB = 2**20


@dataclass(frozen=True)
class RealRow:
    """A student: the sections of its recipe, its widths, and its share of the time."""

    sections: dict[str, dict[str, Any]]
    bits: str
    share: float


def _preset(name: Any, bits: str, share: float) -> RealRow:
    return RealRow(suited(PRESETS[name], bits, "language_modeling"), bits, share)


ROWS: dict[str, RealRow] = {
    "best, 2-2-8": _preset("best", "2-2-8", 0.40),
    "smallest, 2-2-8": _preset("smallest", "2-2-8", 0.20),
    f"{REFERENCE}, 2-2-8": RealRow(named(REFERENCE).sections, "2-2-8", 0.12),
    "best, 4-4-8": _preset("best", "4-4-8", 0.16),
}


@dataclass(frozen=True)
class Settings:
    """How a bench is run: `distill` is laid over every row's recipe."""

    minutes: float
    batch: int
    micro_batch: int
    inference_batch: int
    finetune_lr: float
    only: tuple[str, ...]
    steps: int | None  # of a row, at most
    distill: dict[str, Any]
    compiled: bool | None


def chosen_rows(only: Sequence[str] | None) -> tuple[str, ...]:
    """Return the rows by name, all if none is given. Raises ConfigError for a name that is none."""
    for name in only or ():
        if name not in ROWS:
            raise ConfigError(f"--only {name!r} is no row of this bench; valid: {'; '.join(ROWS)}")
    return tuple(only or ROWS)


def prepared_tokens(folder: Path, scratch: Path) -> FinishedStep[Tokens]:
    """Return the rows of a finished step `tokenize`, by its folder STORE/tokenize/KEY. Raises ConfigError for another
    folder."""
    root = folder.resolve()
    step_dir = StepDir(str(root.parent.parent), Tokens.stage, root.name, str(scratch))
    record = step_dir.record(Tokens) if root.parent.name == Tokens.stage else None
    if record is None:
        raise ConfigError(
            f"--tokens is {str(folder)!r}, which is no finished step; give STORE/tokenize/KEY, which "
            "`bitmill compress CONFIG --until tokenize` makes"
        )
    return FinishedStep(record, step_dir)


def tokens_of_text(model: str, text: str, block_length: int, out: Path) -> FinishedStep[Tokens]:
    """Return rows of text, made in this process as the product makes them, with the model's own tokenizer."""
    from pipeline.flow.plan import plan_run  # with Ray and MLflow, which prepared rows need not
    from pipeline.flow.run import run_plan
    from pipeline.tracking.listener import SilentListener

    fields = {
        "name": "bench-real",
        "model": {"source": model},
        "task": {"block_length": block_length},
        "data": {"source": text},
        "distill": {"steps": 1},
        "resources": {"workers": 0, "storage_uri": str(out / "store")},
    }
    config = load_fields(fields, None, None, "of bench real")
    return run_plan(plan_run(config, Tokens.stage), SilentListener()).finished(Tokens)


def distill_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `--set distill.KNOB=value` lays over every row. Raises ConfigError for anything else."""
    laid_over = {}
    for override in overrides:
        path, _, value = override.partition("=")
        section, _, knob = path.partition(".")
        if section != "distill" or knob not in Distill.model_fields or knob in DECIDED:
            raise ConfigError(
                f"--set {override!r} has no effect here: it takes distill.KNOB=value, and decides {', '.join(DECIDED)} "
                "itself"
            )
        laid_over[knob] = yaml.safe_load(value)
    return laid_over


class RealBench:
    """One folder, one model, one text, one device."""

    def __init__(
        self,
        out: Path,
        source: ModelSource,
        tokens: FinishedStep[Tokens],
        device: torch.device,
        settings: Settings,
        console: Console,
    ) -> None:
        self.out, self.source, self.tokens, self.device = out, source, tokens, device
        self.settings, self.console = settings, console
        self.deadline = time.monotonic() + 60 * settings.minutes
        self.task = task_of(tokens.record.recipe)
        self.words = read_tokenizer(tokens.folder())
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self.folder = out / "teacher"
        self.family = family_for(read_config(source.folder, source.gguf_file).model_type).name

    def run(self) -> dict[str, Any]:
        """Run what has no result yet, as far as the time goes; return the document of `--json`."""
        results: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        with OwnStore(self.out) as store:
            if not (self.folder / "config.json").exists():  # of a folder whose results alone were carried
                self._result(FINETUNE).unlink(missing_ok=True)
            teacher = self._once(FINETUNE, lambda: self._finetune(store))
            left = [name for name in self.settings.only if not self._result(name).exists()]
            for name in self.settings.only:
                seconds = self.deadline - time.monotonic()
                if name in left:
                    seconds *= ROWS[name].share / sum(ROWS[other].share for other in left[left.index(name) :])
                    if seconds <= 0:
                        self.console.print(f"{name}: no time is left; the same command goes on with it")
                        continue
                try:
                    results[name] = self._once(name, partial(self._distil, store, name, seconds, teacher["score_s"]))
                except RunError as error:  # such as a rate at which the loss is not finite
                    failed[name] = str(error)
                    self.console.print(f"{name} failed: {error}")
                self._written(teacher, results, failed)
        document = self._written(teacher, results, failed)
        print_table(self.console, HEADER, _cells(document), title=f"{document['device']}, test split")
        return document

    def _written(self, teacher: dict[str, Any], results: dict[str, Any], failed: dict[str, str]) -> dict[str, Any]:
        """Write the document of `--json`, which is returned, and the table of what is there so far."""
        document = {**described(self.device), "teacher": teacher, "rows": results, "failed": failed}
        (self.out / "real.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.out / "real.md").write_text(_markdown(document))
        return document

    def _once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row's result, run now or before."""
        path = self._result(name)
        if not path.exists():
            begun = time.perf_counter()
            self.console.print(f"{name} ...")
            result = work() | {"all_s": time.perf_counter() - begun}
            path.write_text(json.dumps(result, indent=1) + "\n")
            gc.collect()
        done: dict[str, Any] = json.loads(path.read_text())
        self.console.print(f"{name}: {_said(done)}")
        return done

    def _result(self, name: str) -> Path:
        return self.out / f"{_slug(name)}.json"

    def _finetune(self, store: OwnStore) -> dict[str, Any]:
        """Train the teacher, at most two epochs, score it and save it as a folder."""
        settings, seconds = self.settings, 60 * self.settings.minutes * FINETUNE_SHARE
        made_from = time.perf_counter()
        model = load_model(self.source.folder, self.source.gguf_file)
        set_dropout(model, 0.0)
        keep_all_layers(model)
        student = WithStates(model)

        def job_of(steps: int) -> TrainingJob:
            fields: dict[str, Any] = {"batch_size": settings.batch, "lr": settings.finetune_lr, "steps": steps}
            fields |= {
                "dropout": 0.0,
                "warmup_steps": steps // 10,
                "precision": self.precision,
                "eval_every": math.ceil(steps / 2),
            }
            return self._job(store, FINETUNE, Finetune.model_validate(fields))

        most = math.ceil(FINETUNE_EPOCHS * self.tokens.record.splits["train"].rows / settings.batch)
        planned = self._planned(FINETUNE, job_of, student, None, seconds, made_from, (min(FINETUNE_LEAST, most), most))
        run = self._trained(FINETUNE, planned, job_of, student, None)
        begun = time.perf_counter()
        scores = {split: self._scored(model.eval(), None, split)[0].metrics() for split in SCORED}
        score_s = time.perf_counter() - begun
        model.cpu().save_pretrained(self.folder)
        sizes = {"parameters": parameters(model), "bytes": fp32_bytes(model)}
        return run | sizes | {"scores": scores, "score_s": score_s}

    def _distil(self, store: OwnStore, name: str, seconds: float, score_s: float) -> dict[str, Any]:
        """Train a student for about so many seconds in all, beside those that make it ready; freeze it, and score what
        ships beside its teacher."""
        row, settings, made_from = ROWS[name], self.settings, time.perf_counter()
        quant = Quant.model_validate({**row.sections["quant"], "bits": row.bits})

        def job_of(steps: int) -> TrainingJob:
            fields = {"batch_size": settings.batch, "precision": self.precision, "steps": steps}
            fields |= {"eval_every": math.ceil(steps / VALIDATIONS)}
            recipe = Distill.model_validate({**row.sections["distill"], **settings.distill, **fields})
            return self._job(store, name, recipe)

        student, distillation = distill_stage.make(job_of(GUESSED_STEPS), self.folder, self.family, quant, self.device)
        planned = self._planned(name, job_of, student, distillation, seconds - 4 * score_s, made_from, (1, None))
        run = self._trained(name, planned, job_of, student, distillation)
        teacher = load_model(self.folder)
        family, encoding = family_named(self.family), "base3" if quant.ternary else "dense"
        frozen = freeze_student(student.model.cpu(), quant, family)
        del student, distillation
        packed = _packed_bytes(frozen, encoding, self.out)
        shipped = restore_frozen(read_config(self.folder), quant.spec(), family, frozen).to(self.device)
        scores: dict[str, Any] = {}
        for split in SCORED:
            ours, theirs = self._scored(shipped, teacher.to(self.device).eval(), split)
            documents = Documents(tokens=ours.tokens, teacher=theirs.nats, student=ours.nats)
            student_metrics, teacher_metrics = ours.metrics(), theirs.metrics()
            scores[split] = {
                "student": student_metrics,
                "teacher": teacher_metrics,
                "gap_nats": gap_nats(teacher_metrics, student_metrics),
                "gap_interval": bootstrapped(documents),
            }
        recipe = {"quant": quant.model_dump(mode="json"), "distill": planned_recipe(job_of(planned.steps))}
        return run | {"scores": scores, "packed_bytes": packed, "encoding": encoding, "recipe": recipe}

    def _job(self, store: OwnStore, name: str, recipe: Finetune | Distill) -> TrainingJob:
        splits, settings = self.tokens.record.splits, self.settings
        resources = resources_for(
            self.device,
            settings.compiled,
            micro_batch=settings.micro_batch,
            inference_batch=settings.inference_batch,
        )
        stage = "finetune" if isinstance(recipe, Finetune) else "distill"
        step_dir = store.hold(stage, _slug(name))
        train, validation = splits["train"].shards, splits["validation"].shards
        return TrainingJob(recipe, step_dir, self.tokens.dir, train, validation, resources, None, self.task)

    def _planned(
        self,
        name: str,
        job_of: Callable[[int], TrainingJob],
        student: WithStates,
        distillation: Any,
        seconds: float,
        made_from: float,
        bounds: tuple[int, int | None],
    ) -> Plan:
        """Return how many steps fill so many seconds, from the time of a few that leave nothing behind; what was
        planned before is kept. All that went by since `made_from`, when the row began to be made ready, is granted on
        top of the minutes."""
        path = self.out / f"{_slug(name)}.plan.json"
        if path.exists():
            return Plan(**json.loads(path.read_text()))
        trainer = Trainer(student, job_of(GUESSED_STEPS), distillation, self.device, _silent)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        bank = distillation.bank if distillation is not None else None
        empty = {key: value.clone() for key, value in bank.state_dict().items()} if bank is not None else {}
        timed_from = GUESSED_STEPS - TIMED
        for step in (*range(WARM_UP), timed_from - 1):
            trainer.train_step(step)
        trainer.validate()
        step_s = seconds_a_step(trainer.train_step, timed_from, TIMED, self.device)
        validation_s = seconds_a_step(lambda step: trainer.validate(), 0, 1, self.device)
        trainer.rows.close()
        student.load_state_dict(before)
        if bank is not None:
            bank.load_state_dict(empty)
        least, most = bounds
        steps = max(least, int((seconds - (VALIDATIONS + 1) * validation_s) / step_s))
        ready_s = time.perf_counter() - made_from
        self.deadline += ready_s
        plan = Plan(min(steps, most or steps, self.settings.steps or steps), step_s, ready_s)
        path.write_text(json.dumps(asdict(plan)) + "\n")
        self.console.print(
            f"{name}: {plan.steps} steps of {1e3 * step_s:.0f} ms; ready after {ready_s:.1f} s, beside the minutes"
        )
        return plan

    def _trained(
        self, name: str, plan: Plan, job_of: Callable[[int], TrainingJob], student: WithStates, distillation: Any
    ) -> dict[str, Any]:
        """Train as planned, from the last checkpoint if there is one; return how it went."""
        job = job_of(plan.steps)
        job = replace(job, resources=job.resources.model_copy(update={"checkpoint_minutes": KEEP_S / 60}))
        begun, first, said_s = time.perf_counter(), [0], [0.0]
        most_memory = 0

        def say(done: int, total: int, note: str, points: Any = ()) -> None:
            if note == "resumed":
                first[0] = done
            now_s = time.perf_counter() - begun
            if note and (note == "resumed" or "validation" in note or now_s - said_s[0] >= KEEP_S):
                said_s[0] = now_s
                self.console.print(f"{name}: {done}/{total}, {now_s:.0f} s, {note}")

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        trainer = Trainer(student, job, distillation, self.device, say)
        trainer.run()
        wait(self.device)
        seconds = time.perf_counter() - begun
        write_checkpoint(job.dir, trainer._tensors(), trainer.progress)  # scoring takes long, and may be stopped
        if self.device.type == "cuda":
            most_memory = torch.cuda.max_memory_allocated(self.device)
        a_step = job.recipe.batch_size * self.task.settings.block_length
        return {
            "steps": plan.steps,
            "tokens": plan.steps * a_step,
            "seconds": seconds,
            "tokens_per_s": (plan.steps - first[0]) * a_step / seconds,
            "step_ms": 1e3 * plan.step_s,
            "ready_s": plan.ready_s,
            "resumed_at": first[0],
            "peak_bytes": most_memory,
            "best_step": trainer.progress.best_step,
            "validations": [point for point in trainer.progress.history if "validation_nats" in point],
        }

    def _scored(self, model: Any, teacher: Any, split: SplitName) -> tuple[Scores, Scores]:
        rows = batches(Rows(self.tokens.dir, self.tokens.record.splits[split].shards), self.settings.inference_batch)
        return self.task.score(rows, model, teacher, self.words, Evaluate())


@dataclass(frozen=True)
class Plan:
    """How many steps a row takes, the seconds of one that this was found from, and those until it could begin: its
    model made, compiled and warm."""

    steps: int
    step_s: float
    ready_s: float


def planned_recipe(job: TrainingJob) -> dict[str, Any]:
    """Return the recipe of a job where it differs from the defaults."""
    return job.recipe.model_dump(mode="json", exclude_defaults=True)


def _packed_bytes(frozen: Any, encoding: Any, folder: Path) -> int:
    """Return the bytes of the weights file of a package."""
    tensors, _ = encode(frozen, encoding)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(tensors, Path(scratch) / "weights", metadata={"format": "pt"})
        return (Path(scratch) / "weights").stat().st_size


def _silent(done: int, total: int, note: str, points: Any = ()) -> None:
    """Report nothing."""


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _said(result: dict[str, Any]) -> str:
    test = result["scores"]["test"]
    gap = f"gap {test['gap_nats']:.4f}" if "gap_nats" in test else f"perplexity {test['perplexity']:.2f}"
    return f"{result['tokens']:,} tokens in {result['seconds']:.0f} s, {gap} on test"


def _cells(document: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table under `HEADER`, of the test split."""
    rows = []
    for name, row in document["rows"].items():
        test = row["scores"]["test"]
        low, high = test["gap_interval"] or (math.nan, math.nan)
        student = test["student"]
        rows.append(
            [
                name,
                f"{row['tokens'] / 1e6:.1f}M",
                f"{row['seconds']:.0f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{test['teacher']['perplexity']:.2f}",
                f"{student['perplexity']:.2f}",
                f"{test['gap_nats']:.4f} [{low:.4f}, {high:.4f}]",
                f"{student['kl_nats']:.4f}",
                f"{student['top1_agreement']:.1%}",
                f"{row['packed_bytes'] / MIB:.1f}",
            ]
        )
    return rows


def _markdown(document: dict[str, Any]) -> str:
    """Return the table as a page."""
    teacher = document["teacher"]
    lines = [
        f"{document['device']}, {document['date']}, torch {document['torch']}: a teacher of "
        f"{teacher['parameters'] / 1e6:.1f}M parameters, fine-tuned on {teacher['tokens'] / 1e6:.1f}M tokens in "
        f"{teacher['seconds']:.0f} s ({teacher['bytes'] / MIB:.1f} MiB in fp32). Test split.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells)} |" for cells in _cells(document)),
    ]
    return "\n".join(lines) + "\n"
