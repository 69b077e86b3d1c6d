"""Models of well-known shapes, with random weights, trained for a few steps at full size: that they run at all."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jobs.bench.sizes import MODELS
from jobs.bench.training.held import OwnStore, job_of, resources_for, teacher_step, tokens_step
from jobs.bench.training.measures import described, wait
from jobs.display import print_table
from pipeline.config.data import TaskSettings
from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.config.training import Distill
from pipeline.models.build import build, parameters, read_config
from pipeline.stages import distill as distill_stage
from pipeline.store.records import Teacher, Tokens
from pipeline.store.shards import store_shard, write_tokens
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.summarization import Summarization
from pipeline.tasks.task import Task
from pipeline.training.trainer import Trainer

STEPS = 4
HEADER = ("shape", "parameters", "first step, s", "ms a step", "tokens/s", "loss")


@dataclass(frozen=True)
class Extent:
    """How large the batches are: rows of a step and of a pass, tokens of a row, or of a text, whose summary has an
    eighth of them."""

    batch: int
    micro_batch: int
    length: int

    @classmethod
    def of(cls, device: torch.device, batch: int | None, micro_batch: int | None, length: int | None) -> Extent:
        """Return what is given; else 16 rows of 512 on a GPU, 2 of 128 on a CPU, in two passes."""
        rows, tokens = (16, 512) if device.type == "cuda" else (2, 128)
        rows = batch or rows
        return cls(rows, micro_batch or max(1, rows // 2), length or tokens)


def smoke(
    device: torch.device,
    compiled: bool | None,
    out: Path,
    console: Console,
    extent: Extent,
) -> dict[str, Any]:
    """Train each shape by the preset `best` at 2-2-8, teacher online; print a line each, and return the document of
    `--json`, which `out` has as shapes.json."""
    rows = {}
    for name, source in MODELS.items():
        console.print(f"{name} ...")
        rows[name] = _trained(source, extent, device, compiled)
    document = {**described(device), "extent": asdict(extent), "shapes": rows}
    (out / "shapes.json").write_text(json.dumps(document, indent=1) + "\n")
    print_table(console, HEADER, [_cells(name, row) for name, row in rows.items()], title=document["device"])
    return document


def _trained(source: dict[str, Any], extent: Extent, device: torch.device, compiled: bool | None) -> dict[str, Any]:
    model = build(read_config(source), seed=0)
    task, lengths = _task(model.config.is_encoder_decoder, extent)
    with tempfile.TemporaryDirectory() as folder, OwnStore(Path(folder)) as store:
        tokens_dir, random = store.hold(Tokens.stage, "0" * 32), np.random.default_rng(0)
        ids = random.integers(4, model.config.vocab_size, size=(extent.batch, int(lengths.sum()))).astype(np.int32)
        counts = np.repeat(lengths[None], extent.batch, 0).squeeze(-1) if len(lengths) == 1 else None
        counts = np.repeat(lengths[None], extent.batch, 0) if counts is None else counts
        write = partial(write_tokens, ids=ids, lengths=counts.astype(np.int32))
        a_step = task.tokens(counts)
        shards = [store_shard(tokens_dir, "rows/train-0.parquet", extent.batch, a_step, write)]
        inputs: dict[str, Any] = {
            Tokens.stage: tokens_step(tokens_dir, task, model.config.vocab_size, shards, shards),
            Teacher.stage: teacher_step(store.hold(Teacher.stage, "0" * 32), model, Path(folder) / "teacher"),
        }
        precision = "bf16" if device.type == "cuda" else "fp32"
        fields = {"steps": 1000, "batch_size": extent.batch, "precision": precision}
        recipe = Distill.model_validate({**fields, **PRESETS["best"]["distill"], "fade_in": 0.0})
        quant = Quant.model_validate({**PRESETS["best"]["quant"], "bits": "2-2-8"})
        resources = resources_for(device, compiled, micro_batch=extent.micro_batch)
        job = job_of(store, "distill", "0" * 32, recipe, resources, inputs, False)
        teacher = inputs[Teacher.stage]
        student, distillation = distill_stage.make(job, teacher.folder(), teacher.record.family, quant, device)
        trainer = Trainer(student, job, distillation, device, lambda done, total, note, points=(): None)
        seconds, losses = [], []
        for step in range(STEPS):
            begun = time.perf_counter()
            losses.append(trainer.train_step(step)["loss"])
            wait(device)
            seconds.append(time.perf_counter() - begun)
        trainer.rows.close()
        each = min(seconds[1:])
        return {
            "parameters": parameters(model),
            "first_step_s": seconds[0],
            "ms": 1e3 * each,
            "tokens_per_s": a_step / each,
            "losses": [float(loss) for loss in losses],
        }


def _task(encoder_decoder: bool, extent: Extent) -> tuple[Task, Any]:
    """Return the task of a kind of model, and the lengths of a full row's parts."""
    if not encoder_decoder:
        return LanguageModeling(TaskSettings(block_length=extent.length)), np.array([extent.length])
    lengths = np.array([extent.length, extent.length // 8])
    settings = TaskSettings(name="summarization", source_length=int(lengths[0]), target_length=int(lengths[1]))
    return Summarization(settings), lengths


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{row['parameters'] / 1e6:.1f}M",
        f"{row['first_step_s']:.1f}",
        f"{row['ms']:.1f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
    ]
