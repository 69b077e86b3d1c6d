"""Students: what of a model is quantized, prepared for training, frozen, and restored from what was frozen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError, RunError
from pipeline.models.attention import use_quantized_attention
from pipeline.models.blocks import DECODER_LAYERS, ENCODER_LAYERS, ties_head
from pipeline.models.build import blank, skeleton
from pipeline.models.family import Family, families
from pipeline.models.sharded import part_like
from pipeline.quant.frozen import FrozenTensors, freeze, give_modules, thaw
from pipeline.quant.modules import TIED, QuantTarget, prepare
from pipeline.quant.spec import QuantSpec

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_UNSTORED = 2**22  # numbers in tables that an architecture computes, such as sinusoids
GROUPS = ("codes", "scales", "rest")  # of a file of frozen tensors


def quant_targets(model: PreTrainedModel, family: Family) -> list[QuantTarget]:
    """Return every module of the model that is quantized. Raises ConfigError for a linear layer or an embedding that
    the family does not name."""
    from transformers.pytorch_utils import Conv1D

    family = walked(model, family)
    tied = ties_head(model.config)
    if family.tied_embeddings and not model.config.tie_word_embeddings:
        raise ConfigError(
            f"model: tie_word_embeddings is false, and the family {family.name} has one table for encoder, decoder and "
            "head; such a model cannot be quantized"
        )
    targets: list[QuantTarget] = []
    for name, module in model.named_modules():
        if name == family.embedding:
            targets.append(QuantTarget(name, "embedding"))
        elif name in family.tied_embeddings:
            targets.append(QuantTarget(name, "tied_embedding"))
        elif name == family.head:
            targets.append(QuantTarget(name, "tied_head" if tied else "head"))
        elif isinstance(module, nn.Linear | Conv1D | nn.Embedding) and name not in family.unquantized:
            symmetric = next((s for pattern, s in family.linears if re.fullmatch(pattern, name)), None)
            if symmetric is None:
                raise ConfigError(
                    f"model: the family {family.name} does not know the layer {name} "
                    f"({type(module).__name__}); such a model cannot be quantized"
                )
            targets.append(QuantTarget(name, "linear", symmetric, transposed=isinstance(module, Conv1D)))
    named = {target.name for target in targets} | set(family.unquantized)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.rpartition(".")[0] not in named:
            raise ConfigError(
                f"model: in this {model.config.model_type} model the family {family.name} does not know the matrix "
                f"{name}. Say with model.family whose modules it has, if it has those of a known one."
            )
    if not {"embedding", "linear"} <= {target.role for target in targets}:
        raise ConfigError(f"model: no layers of the family {family.name} in this {model.config.model_type} model")
    return sorted(targets, key=lambda target: target.role in TIED)


def walked(model: PreTrainedModel, family: Family) -> Family:
    """Return the family with the names that the model itself has for embedding, head and other tables, if it is the
    family of models of no family; as it is otherwise. Raises ConfigError for such a model with an encoder."""
    if family.embedding:
        return family
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"model: the layers of a {model.config.model_type!r} model are not known; known families: "
            f"{', '.join(families())}. If it has the modules of one of these, say so with model.family; only a decoder "
            "alone is tried without."
        )
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    return replace(
        family, embedding=names[id(embedding)], head=names.get(id(head), family.head), unquantized=tuple(tables)
    )


def check_spec(model: PreTrainedModel, family: Family, spec: QuantSpec) -> None:
    """Raise ConfigError for an override that names no module of the model, or rows that are no whole groups."""
    targets = [target for target in quant_targets(model, family) if target.role not in TIED]
    names = [target.name for target in targets]
    for pattern, _ in spec.overrides:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(f"quant.overrides: {pattern!r} matches no module; modules: {', '.join(names[:12])} ...")
    for target in targets:
        weight = model.get_submodule(target.name).weight
        columns = int(weight.shape[0 if target.transposed else 1])
        if target.role == "linear" and not spec.granularity.divides(columns):
            raise ConfigError(
                f"quant.granularity is {spec.granularity}, and the rows of {target.name} have {columns} weights, which "
                "are no whole groups. Use per_channel, or a group size that divides them."
            )


def make_student(model: PreTrainedModel, spec: QuantSpec, family: Family) -> None:
    """Turn a full-precision model into a quantized student, in place."""
    prepare(model, quant_targets(model, family), spec)
    use_quantized_attention(model, spec)


def check_tensors(
    config: PreTrainedConfig, spec: QuantSpec, family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError or ConfigError, before any memory is asked for, for tensors that are not the architecture's, or
    settings that ask for more parts or buffers than they fill."""
    for name in {*ENCODER_LAYERS, *DECODER_LAYERS}:
        if getattr(config, name, 0) > len(shapes):
            raise ValueError(f"{name} is {getattr(config, name)}, and there are fewer tensors")
    model = skeleton(config)
    give_modules(model, quant_targets(model, family), spec, shapes)
    unstored = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in shapes)
    if unstored > MOST_UNSTORED + sum(map(math.prod, shapes.values())):
        raise ValueError(f"the settings ask for tables of {unstored} numbers, more than the tensors hold")


def restore_frozen(config: PreTrainedConfig, spec: QuantSpec, family: Family, frozen: FrozenTensors) -> PreTrainedModel:
    """Return the frozen student as a model that runs. Raises ValueError if the tensors do not fit; those of a package
    are looked at by `check_tensors` first."""
    model = blank(config)
    thaw_into(model, spec, family, frozen)
    return model.eval()


def thaw_into(model: PreTrainedModel, spec: QuantSpec, family: Family, frozen: FrozenTensors) -> None:
    """Turn a model of the student's architecture into it, in place. Raises ValueError if the tensors do not fit."""
    thaw(model, quant_targets(model, family), spec, frozen)
    use_quantized_attention(model, spec)


def freeze_student(model: PreTrainedModel, quant: Quant, family: Family) -> FrozenTensors:
    """Return a student's codes, scales and other tensors as `quant` has them ship."""
    positions = dict.fromkeys(walked(model, family).unquantized, quant.positions) if quant.positions else {}
    return freeze(model, quant.spec(), getattr(torch, quant.scale_dtype), getattr(torch, quant.rest_dtype), positions)


def save_frozen(frozen: FrozenTensors, path: Path) -> None:
    """Write frozen tensors to a safetensors file, codes unpacked."""
    tensors = {f"{group}.{name}": t.contiguous() for group in GROUPS for name, t in getattr(frozen, group).items()}
    grids = json.dumps({"bits": frozen.bits, "levels": frozen.levels})
    save_file(tensors, path, metadata={"grids": grids})  # one entry: the order of several differs from file to file


def load_frozen(path: Path) -> FrozenTensors:
    """Return the tensors that `save_frozen` wrote."""
    with safe_open(path, framework="pt") as file:
        frozen = FrozenTensors(**json.loads(file.metadata()["grids"]))
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            group, _, name = key.partition(".")
            getattr(frozen, group)[name] = file.get_tensor(key)
    return frozen


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy a tensor into every parameter, a tied one once; of one that is shared out, this worker's part. Raises
    RunError if names or shapes differ."""
    named = dict(model.named_parameters())
    expected, given = ({(name, tuple(t.shape)) for name, t in each.items()} for each in (named, tensors))
    if expected != given:
        raise RunError(f"The stored weights do not fit the model: {sorted(expected ^ given)[:3]}")
    for name, parameter in named.items():
        parameter.copy_(part_like(tensors[name], parameter))
