"""Models from folders and configurations: built, checked against their family, prepared as students."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError, RunError
from pipeline.models.attention import use_quantized_attention
from pipeline.models.families import bart, gpt2, llama
from pipeline.models.family import Family
from pipeline.quant.layers import TIED, FrozenTensors, Site, fit, freeze, prepare, thaw
from pipeline.quant.spec import QuantSpec

logging.set_verbosity_error()  # what matters is said by our own errors and progress
logging.disable_progress_bar()

MOST_UNSTORED = 2**22  # numbers in tables that an architecture computes, such as sinusoids
FAMILIES = {family.name: family for family in (gpt2.FAMILY, llama.FAMILY, bart.FAMILY)}


def read_config(source: Path | dict[str, Any], gguf_file: str | None = None, **decided: Any) -> PreTrainedConfig:
    """A configuration from a folder, or from {architecture: ..., key: value} with what is `decided` elsewhere.

    Raises:
        ConfigError: an unknown architecture or key, a value it cannot take, a folder without a usable config.json.
    """
    if isinstance(source, Path):
        try:
            extra = {"gguf_file": gguf_file} if gguf_file else {}
            return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True, **extra)
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise ConfigError(f"model.source: {source} has no usable config.json: {error}") from error
    architecture = source["architecture"]
    fields = {name: _number(value) for name, value in source.items() if name != "architecture"}
    try:
        defaults = AutoConfig.for_model(architecture, bos_token_id=None, eos_token_id=None)
    except (ValueError, TypeError):
        valid = ", ".join(FAMILIES)
        raise ConfigError(f"model.source.architecture is {architecture!r}; valid: {valid}") from None
    known = {*defaults.to_dict(), *defaults.attribute_map} - {"model_type", *decided}
    for name in fields:
        if name in decided:
            raise ConfigError(f"model.source.{name}: the tokenizer decides it ({decided[name]}); leave it out")
        if name not in known:
            valid = ", ".join(sorted(known))
            raise ConfigError(f"model.source.{name}: {architecture} has no such setting; valid: {valid}")
    try:
        return AutoConfig.for_model(architecture, **{"bos_token_id": None, "eos_token_id": None, **fields, **decided})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"model.source: {source} does not make a {architecture} model: {error}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def family_of(config: PreTrainedConfig, requested: str = "auto") -> Family:
    """Raises ConfigError for a model whose layers are unknown."""
    name = config.model_type if requested == "auto" else requested
    if name not in FAMILIES:
        raise ConfigError(
            f"model: the layers of a {config.model_type!r} model are not known; known families: {', '.join(FAMILIES)}. "
            "If it has the modules of one of these, say so with model.family."
        )
    return FAMILIES[name]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ConfigError: settings that do not fit together.
    """
    try:
        with torch.device("meta"), no_init_weights():  # which leaves out tying as well
            model: PreTrainedModel = _auto(config).from_config(config)
    except (ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model: a {config.model_type} model cannot be built from these settings: {error}") from error
    model.tie_weights()
    return model


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with fresh fp32 weights."""
    torch.manual_seed(seed)
    return _auto(config).from_config(config, dtype=torch.float32)


def _auto(config: PreTrainedConfig) -> Any:
    """The class that builds a model with a language-modelling head: decoder-only, or encoder and decoder."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(folder: Path, gguf_file: str | None = None) -> PreTrainedModel:
    """fp32 weights from a folder; safetensors (or GGUF) only, no remote code.

    Raises:
        ConfigError: a tensor of the model is missing or has another shape.
    """
    kind: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        model, found = _auto(read_config(folder, gguf_file)).from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **kind,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"The model in {folder} cannot be loaded: {error}") from error
    if found["missing_keys"]:
        raise ConfigError(f"The model in {folder} lacks the tensors {', '.join(sorted(found['missing_keys'])[:3])}.")
    loaded: PreTrainedModel = model
    loaded.hf_quantizer = None  # GGUF weights are dequantized by now, and a model that says otherwise cannot be saved
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    return loaded


def sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """Every module of the model that is quantized.

    Raises:
        ConfigError: a linear layer or an embedding that the family does not name.
    """
    tied = bool(model.config.tie_word_embeddings)
    if family.tied_embeddings and not tied:
        raise ConfigError(
            f"model: tie_word_embeddings is false, and the family {family.name} has one table for encoder, decoder and "
            "head; such a model cannot be quantized"
        )
    found: list[Site] = []
    for name, module in model.named_modules():
        if name == family.embedding:
            found.append(Site(name, "embedding"))
        elif name in family.tied_embeddings:
            found.append(Site(name, "tied_embedding"))
        elif name == family.head:
            found.append(Site(name, "tied_head" if tied else "head"))
        elif isinstance(module, nn.Linear | Conv1D | nn.Embedding) and name not in family.unquantized:
            symmetric = next((s for pattern, s in family.linears if re.fullmatch(pattern, name)), None)
            if symmetric is None:
                raise ConfigError(
                    f"model: the family {family.name} does not know the layer {name} "
                    f"({type(module).__name__}); such a model cannot be quantized"
                )
            found.append(Site(name, "linear", symmetric, transposed=isinstance(module, Conv1D)))
    named = {site.name for site in found} | set(family.unquantized)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.rpartition(".")[0] not in named:
            raise ConfigError(f"model: the family {family.name} does not know the matrix {name}")
    if not any(site.role == "embedding" for site in found) or not any(site.role == "linear" for site in found):
        raise ConfigError(f"model: no layers of the family {family.name} in this {model.config.model_type} model")
    return sorted(found, key=lambda site: site.role in TIED)


def make_student(model: PreTrainedModel, spec: QuantSpec, family: Family) -> None:
    """Turn a full-precision model into a quantized student, in place."""
    prepare(model, sites(model, family), spec)
    use_quantized_attention(model, spec)


def check_tensors(
    config: PreTrainedConfig, spec: QuantSpec, family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not the architecture's, before any memory is asked for.

    Raises:
        ValueError, ConfigError: they are others, or the settings ask for more parts or buffers than they fill.
    """
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if getattr(config, name, 0) > len(shapes):
            raise ValueError(f"{name} is {getattr(config, name)}, and there are fewer tensors")
    model = skeleton(config)
    fit(model, sites(model, family), spec, shapes)
    unstored = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in shapes)
    if unstored > MOST_UNSTORED + sum(map(math.prod, shapes.values())):
        raise ValueError(f"the settings ask for tables of {unstored} numbers, more than the tensors hold")


def restore_frozen(config: PreTrainedConfig, spec: QuantSpec, family: Family, frozen: FrozenTensors) -> PreTrainedModel:
    """The frozen student as a model that runs. Raises as `check_tensors` does."""
    check_tensors(config, spec, family, frozen.shapes)
    model: PreTrainedModel = _auto(config).from_config(config, dtype=torch.float32)
    thaw_into(model, spec, family, frozen)
    return model.eval()


def thaw_into(model: PreTrainedModel, spec: QuantSpec, family: Family, frozen: FrozenTensors) -> None:
    """Turn a model of the student's architecture into it, in place. Raises ValueError if the tensors do not fit."""
    thaw(model, sites(model, family), spec, frozen)
    use_quantized_attention(model, spec)


def frozen_student(folder: Path, weights: Path, quant: Quant, family: Family) -> FrozenTensors:
    """The trained student's codes, scales and other tensors in the dtypes that ship.

    `folder` is the teacher's, for the architecture and the buffers, which do not train; `weights` the student's
    latent weights.
    """
    model = load_model(folder)
    make_student(model, replace(quant.spec(), gamma_init="one"), family)
    load_parameters(model, load_file(weights))
    return freeze_student(model, quant, family)


def freeze_student(model: nn.Module, quant: Quant, family: Family) -> FrozenTensors:
    """A student's codes, scales and other tensors as `quant` has them ship."""
    positions = dict.fromkeys(family.unquantized, quant.positions) if quant.positions else {}
    return freeze(model, quant.spec(), getattr(torch, quant.scale_dtype), getattr(torch, quant.rest_dtype), positions)


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy a tensor into every parameter, a tied one once. Raises RunError if the names differ."""
    named = dict(model.named_parameters())
    if set(named) != set(tensors):
        raise RunError(f"The stored weights do not fit the model: {sorted(set(named) ^ set(tensors))[:3]}")
    for name, parameter in named.items():
        parameter.copy_(tensors[name])


def check_spec(model: PreTrainedModel, family: Family, spec: QuantSpec) -> None:
    """Raises ConfigError for an override that names no module of the model."""
    names = [site.name for site in sites(model, family) if site.role not in TIED]
    for pattern, _ in spec.overrides:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(f"quant.overrides: {pattern!r} matches no module; modules: {', '.join(names[:12])} ...")


def set_dropout(model: nn.Module, probability: float) -> None:
    """Every dropout of a model: modules, attention's, and BART's, which are plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    keep_all_layers(model)


def keep_all_layers(model: nn.Module) -> None:
    """No layer is left out at random: its parameters would have no gradient, and workers would draw different ones."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0  # type: ignore[assignment]


def parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def fp32_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint in fp32: parameters, and the buffers that are stored, such as `final_logits_bias`."""
    stored = model.state_dict()
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in stored)
    return 4 * (parameters(model) + buffers)
