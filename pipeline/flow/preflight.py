"""What is resolved and checked before any worker starts: sources pinned; the model's layers, vocabulary and lengths."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.data import TrainBpe
from pipeline.config.quant import Quant
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.models.blocks import LONGEST, angles_change_at, depth_of
from pipeline.models.build import model_type_of, parameters, read_config, skeleton
from pipeline.models.checkpoint import DROP, check_tensors_fit, refuse_quantized, weight_files
from pipeline.models.device import CPU, device_for, emulates_bf16, this_device
from pipeline.models.family import AUTO, WALKED, Family, families, family_for
from pipeline.models.gguf_file import check_fits, counted, told_of_words
from pipeline.models.hidden_states import WithStates
from pipeline.models.student import check_spec, make_student, quant_targets
from pipeline.models.values import refuse_not_finite, remembered_values, some_of
from pipeline.package.size import layout
from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_splits
from pipeline.sources.models import pin_models
from pipeline.stages.stage import PinnedRun
from pipeline.store.locations import make_scratch_dir
from pipeline.store.records import Evaluation, Record, Sensitivity, Student, Teacher, TeacherCache
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig, PreTrainedModel

# What is made on a GPU, if there is any.
COMPUTING: frozenset[type[Record]] = frozenset((Teacher, TeacherCache, Sensitivity, Student, Evaluation))


def pin(config: Config) -> PinnedRun:
    """Pin every source by content; what keys are made of, and no more, is looked at.

    Raises:
        ConfigError: a source that is not there, or a model that is not known.
    """
    section, scratch = config.model, make_scratch_dir(config.resources)
    memo = ContentMemo(scratch)
    text = pin_splits(config.data, memo)
    model, tokenizer = pin_models(section, memo, config.resources)
    model_type = model_type_of(section.source) if model is None else model_type_of(model.folder, model.gguf_file)
    family = family_for(model_type, section.family)
    return PinnedRun(config, text, model, tokenizer, family)


def model_of(run: PinnedRun) -> PreTrainedModel:
    """Return the model without memory. Raises ConfigError: it cannot be built, or does not fit its tokenizer."""
    return skeleton(model_config(run))


def check_checkpoint(run: PinnedRun, shape: PreTrainedModel) -> list[str]:
    """Return what people should know of the checkpoint of a run, whose model without memory is `shape`. Its numbers are
    read once and remembered, as its checksums are.

    Raises:
        ConfigError: its tensors are not the model's, or hold NaN or infinity.
    """
    words = run.tokenizer if run.tokenizer is not None and run.tokenizer.gguf_file is not None else None
    told = [] if words is None else told_of_words(words.folder / str(words.gguf_file))
    if run.model is None:
        return told
    section, memo = run.config.model, ContentMemo(make_scratch_dir(run.config.resources))
    if run.model.gguf_file is not None:
        path = run.model.folder / run.model.gguf_file
        notes, extra = check_gguf_file(shape, path, section.unused_tensors)
        refuse_not_finite(remembered_values(memo.remembered, path), path)
        left_out = [f"model.unused_tensors is drop: {counted(extra, path)} are left out."] if extra else []
        return told + notes + left_out
    dropped = check_tensors_fit(shape, run.model.folder, section.unused_tensors)
    for path in weight_files(run.model.folder):
        refuse_not_finite(remembered_values(memo.remembered, path), path)
    if not dropped:
        return told
    return [
        *told,
        f"model.unused_tensors is drop: {len(dropped)} tensors of {section.source}, which its config.json has no place "
        f"for, are left out: {some_of(dropped)}.",
    ]


def check_gguf_file(shape: PreTrainedModel, path: Path, unused: str) -> tuple[list[str], list[str]]:
    """Return what people should know of a GGUF file that a model without memory is to be loaded from, and the names of
    the tensors that it leaves out. Raises ConfigError where that would be another model than the file's."""
    from pipeline.export.gguf import check_read

    check_read(shape.config, path)
    return check_fits(shape, path, unused == DROP)


def told_of_family(shape: PreTrainedModel, family: Family) -> list[str]:
    """Return what is to be quantized of a model that no family knows, by name; nothing of others."""
    if family != WALKED:
        return []
    names = sorted({re.sub(r"\.\d+\.", ".*.", target.name) for target in quant_targets(shape, family)})
    return [
        f"No family knows a {shape.config.model_type} model. What its modules are called is found by a walk over them: "
        f"quantized are {', '.join(names)}, and nothing else. If it has the modules of a family, say so with "
        f"model.family; valid: {', '.join(families())}."
    ]


def told_of_packing(run: PinnedRun, shape: PreTrainedModel) -> list[str]:
    """Return that documents do not share rows where they were to, and why."""
    if not run.config.task.packs or run.packed:
        return []
    length, changed = run.config.task.block_length, angles_change_at(shape.config)
    if changed is not None and changed < length:
        return [
            f"task.packing: task.block_length is {length}, and a {shape.config.model_type} model of rope_type longrope "
            f"turns by other angles in a pass of more than {changed} tokens: each conversation has a row of its own. "
            f"Up to {changed} they share rows."
        ]
    return [
        f"task.packing: no family knows a {shape.config.model_type} model, so that nobody can say whether a mask keeps "
        "conversations of one row apart: each has a row of its own."
    ]


def told_of_lengths(run: PinnedRun, shape: PreTrainedModel) -> list[str]:
    """Return which lengths of the task go beyond what a model has learned whose positions are relative, and have no
    bound that would refuse them; nothing of other models."""
    sides, config = run.family.sides, shape.config
    if sides is None or not sides.encoder.relative:
        return []
    known = getattr(config, "n_positions", None) if run.model is not None else None
    told = []
    for knob, length in run.task.positions.items():
        if known is not None and length > known:
            told.append(
                f"{knob} is {length}, and {run.config.model.source} was trained on up to {known} tokens (its "
                f"n_positions). Positions of a {config.model_type} model are relative and have no bound: more are "
                f"read, those {config.relative_attention_max_distance} and more apart as if all were equally far."
            )
        if length > LONGEST:
            told.append(
                f"{knob} is {length}, and of what ships `generate` and the packed runtime read up to {LONGEST} tokens, "
                f"for positions of a {config.model_type} model have no bound of their own."
            )
    return told


def inspect(run: PinnedRun, shape: PreTrainedModel | None = None) -> int:
    """Return the number of the model's parameters, once model, tokenizer, task and quantization are checked to fit
    together; `shape` is what `model_of` gave, if it was asked before.

    Raises:
        ConfigError: the first thing that cannot work.
    """
    shape = model_of(run) if shape is None else shape
    config = shape.config
    check_spec(shape, run.family, run.config.quant.spec())
    if run.family.name != config.model_type:
        try_student(config, run.family, run.config.quant)
    given = run.config.model.source if isinstance(run.config.model.source, dict) else ()
    run.task.check_model(config, given, {name: family.encoder_decoder for name, family in families().items()})
    layers = depth_of(config)[1]
    if run.config.distill.compared_layer < -layers - 1:
        raise ConfigError(
            f"distill.contrast_layer is {run.config.distill.contrast_layer}, and the model has {layers} decoder layers "
            f"and the embedding; valid: -1 to {-layers - 1}."
        )
    return parameters(shape)


def try_student(config: PreTrainedConfig, family: Family, quant: Quant) -> None:
    """Make a student without memory of a model that is taken under another family's name, and lay out its package.
    Raises ConfigError where its modules do not take that."""
    try:
        student = skeleton(config)
        make_student(student, quant.spec(), family)
        WithStates(student)
        layout(skeleton(config), family, quant)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.family is {family.name}, and a {config.model_type} model does not work under that name: {error}. "
            f"Valid for model.family: {AUTO}, {', '.join(families())}."
        ) from error


def warnings(config: Config, left: Collection[type[Record]]) -> list[str]:
    """Return what will work and is not what one would expect of this machine, with the knob, for steps that are left.
    A cluster's machines are not known before it is reached."""
    resources, told = config.resources, list[str]()
    if resources.ray_address is not None or not COMPUTING.intersection(left):
        return told
    gpu = this_device() != CPU
    if gpu and not resources.gpus_per_worker:
        told.append(
            "This machine has a GPU, and all is computed on the CPU, because resources.gpus_per_worker is 0. Set "
            "resources.gpus_per_worker: 1 to use it."
        )
    if resources.gpus_per_worker and not resources.workers and not gpu:
        told.append(
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, and this machine has no GPU that torch can "
            "use: with resources.workers: 0 all is computed on the CPU. Set resources.gpus_per_worker: 0."
        )
    trained = {
        "finetune": config.finetune if Teacher in left else None,
        "distill": config.distill if Student in left else None,
    }
    for section, recipe in trained.items():
        if recipe is not None and recipe.precision == "bf16" and device_for(resources) == CPU and emulates_bf16():
            told.append(
                f"{section}.precision is bf16, which the CPU of this machine emulates: a step takes many times as long "
                f"as in fp32. Set {section}.precision: fp32."
            )
    return told


def model_config(run: PinnedRun) -> PreTrainedConfig:
    """Return the model's configuration, with a vocabulary that fits the tokenizer.

    Raises:
        ConfigError: it does not, or the tokenizer lacks what the task needs.
    """
    section, size = run.config.model, None
    if run.tokenizer is not None:
        words = read_tokenizer(run.tokenizer.folder, run.tokenizer.gguf_file)
        run.task.check_tokenizer(words)
        size = len(words)
    elif isinstance(section.tokenizer, TrainBpe):
        size = section.tokenizer.train_bpe
    if run.model is None:
        return read_config(section.source, vocab_size=size)
    config = run.settings
    if run.model.gguf_file is None:
        refuse_quantized(config, "model.source", str(section.source))
    # A model's own tokenizer may be smaller than its table, which many models pad; another one has to match.
    if size is not None and (size > config.vocab_size or (section.tokenizer and size != config.vocab_size)):
        raise ConfigError(
            f"The tokenizer has {size} tokens and the model {config.vocab_size}; they do not belong together. "
            f"model.source is {section.source!r}, model.tokenizer is {section.tokenizer!r}."
        )
    return config
