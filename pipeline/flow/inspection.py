"""What can be told of a model before anything starts: its matrices, their size at each width, what takes it, what is
unusual. Reads headers, and each number of the weights once, which is remembered; starts nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.export import FORMATS, format_named
from pipeline.flow.preflight import check_gguf_file, told_of_family
from pipeline.models.build import fp32_bytes, parameters, read_config, skeleton
from pipeline.models.checkpoint import DROP, check_tensors_fit, refuse_quantized, stored_tensors, weight_files
from pipeline.models.family import Family, family_for
from pipeline.models.gguf_file import told_of_words
from pipeline.models.student import quant_targets
from pipeline.models.values import Values, remembered_values, some_of
from pipeline.package.size import layout
from pipeline.quant.granularity import GROUP_SIZES
from pipeline.quant.modules import TIED
from pipeline.quant.spec import UNQUANTIZED, WEIGHT_WIDTHS
from pipeline.runtime import build as runtime
from pipeline.sources.content import ContentMemo
from pipeline.sources.models import TOKENIZER_FILES, ModelSource, pin_model
from pipeline.store.locations import make_scratch_dir
from pipeline.tasks.tokenizers import read_tokenizer

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig, PreTrainedModel

OUTLIER = 40.0  # times the root of the mean square; of weights that are normal, the largest of a billion is at 6


@dataclass(frozen=True)
class Matrices:
    """Matrices that differ by their layer alone."""

    name: str  # with * for the numbers
    role: str
    count: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Inspection:
    """A model as it is found. `packed_bytes` is the whole weights file by the width of all matrices; `takes` says of
    each runtime and export nothing if it takes the model, else why not; `groups` are the sizes of groups that the rows
    of all linear layers are whole multiples of, which whatever takes the model takes as well."""

    model: str
    model_type: str
    family: str
    parameters: int
    fp32_bytes: int
    matrices: tuple[Matrices, ...]
    packed_bytes: dict[str, int]
    takes: dict[str, str]
    groups: tuple[int, ...]
    unusual: tuple[str, ...]


def inspect_model(model: str, family: str, resources: Resources) -> Inspection:
    """Return what can be told of `model`, which is what model.source may be. Raises ConfigError for one that cannot be
    a teacher, but for tensors that it has no place for and numbers that are none, which are told."""
    memo = ContentMemo(make_scratch_dir(resources))
    source = pin_model(model, "MODEL", memo)
    config = read_config(source.folder, source.gguf_file)
    if source.gguf_file is None:
        refuse_quantized(config, "MODEL", model)
    known, shape = family_for(config.model_type, family), skeleton(config)
    file = source.folder / source.gguf_file if source.gguf_file else None
    if file is None:
        unfit = _left_out(check_tensors_fit(shape, source.folder, DROP), "config.json describes")
    else:
        notes, extra = check_gguf_file(shape, file, DROP)
        unfit = [*notes, *_left_out(extra, "its settings describe"), *told_of_words(file)]
    matrices = _matrices(shape, known)
    return Inspection(
        model=model,
        model_type=config.model_type,
        family=known.name,
        parameters=parameters(shape),
        fp32_bytes=fp32_bytes(shape),
        matrices=matrices,
        packed_bytes=_sizes(config, known),
        takes={name: _reason_against(name, config) for name in ("packed runtime", *FORMATS)},
        groups=tuple(
            size
            for size in GROUP_SIZES
            if all(matrix.columns % size == 0 for matrix in matrices if matrix.role == "linear")
        ),
        unusual=(
            *told_of_family(shape, known),
            *unfit,
            *_padding(config, model, memo),
            *_of_values(source, memo),
        ),
    )


def _matrices(shape: PreTrainedModel, family: Family) -> tuple[Matrices, ...]:
    """Return what is quantized, those that differ by a number in their names together."""
    together: dict[tuple[str, str, int, int], int] = {}
    for target in quant_targets(shape, family):
        if target.role in TIED:
            continue
        size = tuple(shape.get_submodule(target.name).weight.shape)
        rows, columns = size[::-1] if target.transposed else size
        kind = (re.sub(r"\.\d+\.", ".*.", target.name), target.role, int(rows), int(columns))
        together[kind] = together.get(kind, 0) + 1
    return tuple(Matrices(name, role, count, *size) for (name, role, *size), count in together.items())


def _sizes(config: PreTrainedConfig, family: Family) -> dict[str, int]:
    """Count the bytes of the weights file at each width of all matrices, one scale a row."""
    laid_out = layout(skeleton(config), family, Quant(granularity="per_channel"))
    return {
        f"{width}-{width}-8": laid_out.packed_bytes(dict.fromkeys(laid_out.modules, width))
        for width in WEIGHT_WIDTHS
        if width != UNQUANTIZED
    }


def _reason_against(name: str, config: PreTrainedConfig) -> str:
    """Return why a runtime or an export does not take a model; nothing if it does."""
    try:
        (format_named(name).load() if name in FORMATS else runtime).check(config)
    except ConfigError as error:
        return str(error)
    return ""


def _left_out(dropped: Sequence[str], described: str) -> list[str]:
    if not dropped:
        return []
    count = f"{len(dropped)} tensors are not of the model that {described}: {some_of(dropped)}"
    return [f"{count}. `compress` refuses it without model.unused_tensors: drop."]


def _padding(config: PreTrainedConfig, model: str, memo: ContentMemo) -> list[str]:
    """Tell of a vocabulary that is not the tokenizer's."""
    try:
        words = pin_model(model, "MODEL", memo, TOKENIZER_FILES)
        size, rows = len(read_tokenizer(words.folder, words.gguf_file)), int(config.vocab_size)
    except ConfigError as error:
        return [f"Set model.tokenizer, for there is none beside the model: {error}"]
    if size == rows:
        return []
    if size < rows:
        return [f"{rows - size} of the vocabulary's {rows} rows are padding: the tokenizer has {size} tokens."]
    return [f"The tokenizer has {size} tokens, and the model {rows}: they do not belong together."]


def _of_values(source: ModelSource, memo: ContentMemo) -> list[str]:
    """Tell of tensors with NaN or infinity, and of those of a folder outliers and rows of zeros."""
    packed = [source.folder / source.gguf_file] if source.gguf_file is not None else []
    shapes = {} if packed else {name: tensor.shape for name, tensor in stored_tensors(source.folder).items()}
    told = []
    for path in packed or weight_files(source.folder):
        for name, values in remembered_values(memo.remembered, path).items():
            told += _of_tensor(name, shapes.get(name, ()), values)
    return told


def _of_tensor(name: str, shape: tuple[int, ...], values: Values) -> list[str]:
    told = []
    if values.nans or values.infinite:
        told.append(f"{name} holds {values.nans} NaN and {values.infinite} infinite: `compress` refuses it.")
    if len(shape) == 2 and values.dead_rows:
        told.append(f"{name}: {values.dead_rows} of {shape[0]} rows are zeros alone.")
    if len(shape) == 2 and values.outlier > OUTLIER:
        told.append(
            f"{name}: its largest weight is {values.outlier:.0f} times the root of the mean square of its "
            f"{math.prod(shape):,}: at few bits use quant.granularity: per_channel, or more bits (quant.overrides)."
        )
    return told
