"""Models from folders and configurations, built and counted. Transformers is imported where it is used: a plan of a run
whose steps are all done needs none of it."""

from __future__ import annotations

import contextlib
import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.blocks import ties_head
from pipeline.models.checkpoint import DROP, REFUSE, refuse_unfit
from pipeline.models.family import families
from pipeline.models.gguf_file import DAMAGED, alone, scale_angles

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedConfig, PreTrainedModel


@lru_cache(maxsize=1)
def _quietly() -> None:
    """Let transformers say nothing: what matters is said by our own errors and progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_type_of(source: Path | str | dict[str, Any], gguf_file: str | None = None) -> str:
    """Return transformers' name of an architecture or of a folder's model. Raises ConfigError as `read_config` does."""
    if isinstance(source, dict):
        name = str(source["architecture"])
        return name if name in families() else str(read_config({"architecture": name}).model_type)
    if gguf_file is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # which read_config explains
            return str(json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["model_type"])
    return str(read_config(source, gguf_file).model_type)


def read_config(source: Path | str | dict[str, Any], gguf_file: str | None = None, **decided: Any) -> PreTrainedConfig:
    """Return a configuration from a folder, or from {architecture: ..., key: value} with what is `decided` elsewhere,
    as far as the architecture has it.

    Raises:
        ConfigError: for an unknown architecture or key, a value it cannot take, a folder without a usable config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    _quietly()
    if not isinstance(source, dict):
        described = f"usable settings in {gguf_file}" if gguf_file else "usable config.json"
        try:
            if gguf_file is None:
                return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
            state = (path := Path(source).resolve() / gguf_file).stat()
            return copy.deepcopy(_config_of(path, state.st_size, state.st_mtime_ns))
        except (*DAMAGED, StrictDataclassError) as error:
            raise ConfigError(f"model.source: {source} has no {described}: {error}") from error
    architecture = source["architecture"]
    fields = {name: _number(value) for name, value in source.items() if name != "architecture"}
    try:
        defaults = AutoConfig.for_model(architecture)
    except (ValueError, TypeError):
        valid = ", ".join(families())
        raise ConfigError(f"model.source.architecture is {architecture!r}; valid: {valid}") from None
    more = {"decoder_start_token_id"} if defaults.is_encoder_decoder else set()  # for which T5 has no default
    known = {*defaults.to_dict(), *defaults.attribute_map, *more} - {"model_type", *decided}
    for name in fields:
        if name in decided:
            raise ConfigError(f"model.source.{name}: the tokenizer decides it ({decided[name]}); leave it out")
        if name not in known:
            valid = ", ".join(sorted(known))
            raise ConfigError(f"model.source.{name}: {architecture} has no such setting; valid: {valid}")
    special = dict.fromkeys(("bos_token_id", "eos_token_id"))
    vocabulary: Any = decided.get("vocab_size") or fields.get("vocab_size") or getattr(defaults, "vocab_size", 0)
    taken = {name: value for name, value in decided.items() if hasattr(defaults, name) or name in more}
    try:
        if not defaults.is_encoder_decoder or (defaults.pad_token_id or 0) >= vocabulary:
            special["pad_token_id"] = None  # that of another vocabulary
        return AutoConfig.for_model(architecture, **{**special, **fields, **taken})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"model.source: {source} does not make a {architecture} model: {error}") from error


@lru_cache(maxsize=4)
def _config_of(path: Path, size: int, mtime_ns: int) -> PreTrainedConfig:
    """Read the configuration of a GGUF file, once for as long as the file stays as it is."""
    from transformers import AutoConfig

    with alone(path.parent, path.name) as (folder, kind):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kind)
    scale_angles(config, path)
    return config


def _number(value: Any) -> Any:
    """Return the number that a string spells, since YAML 1.1 reads 1e-5 as a string; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device: shapes and names, no memory. Raises ConfigError for settings at odds."""
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():  # which leaves out tying as well
            model: PreTrainedModel = auto_class(config).from_config(config)
    except (ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise ConfigError(f"model: a {config.model_type} model cannot be built from these settings: {error}") from error
    model.tie_weights()
    return with_own_head(model)


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model with fresh fp32 weights."""
    torch.manual_seed(seed)
    return blank(config)


def blank(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model in fp32, whose numbers are whatever is drawn."""
    return with_own_head(auto_class(config).from_config(config, dtype=torch.float32))


def with_own_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with a head that has a table of its own, in place, where it has one and transformers ties it all
    the same: it leaves two tables of a checkpoint apart only while it reads them."""
    head: Any = model.get_output_embeddings()
    if not model.config.tie_word_embeddings or ties_head(model.config):
        return model
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    model._tied_weights_keys = {key: table for key, table in (model._tied_weights_keys or {}).items() if key != name}
    model.all_tied_weights_keys.pop(name, None)
    if head.weight is cast(Any, model.get_input_embeddings()).weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that builds a model with a language-modelling head: decoder-only, or encoder and decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def decoding(model: PreTrainedModel) -> dict[str, Any]:
    """Return what to give `generate` besides: with an encoder a cache of as many layers as come, for transformers makes
    one of as many as T5's encoder has."""
    from transformers import DynamicCache, EncoderDecoderCache

    grows = model.config.is_encoder_decoder
    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if grows else {}


def load_model(folder: Path, gguf_file: str | None = None, unused: str = REFUSE) -> PreTrainedModel:
    """Load fp32 weights from a folder; safetensors (or GGUF) only, no remote code.

    Raises:
        ConfigError: a tensor of the model is missing or has another shape; the folder has more than the model takes,
            unless what is `unused` is to be dropped.
    """
    from safetensors import SafetensorError

    config = read_config(folder, gguf_file)
    try:
        with alone(folder, gguf_file) as (source, kind):
            model, loading = auto_class(config).from_pretrained(
                source,
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused by name
                **({**kind, "config": config} if kind else {"use_safetensors": True}),
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"The model in {folder} cannot be loaded: {error}") from error
    loaded = with_own_head(model)
    refuse_unfit(loaded, loading, folder, DROP if gguf_file else unused)
    if not gguf_file:
        loaded.tie_weights()  # as config.json has it, also where the folder has two tables
    loaded.hf_quantizer = None  # GGUF weights are dequantized by now, and a model that says otherwise cannot be saved
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    return loaded


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model: modules, attention's, and BART's, which are plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    keep_all_layers(model)


def keep_all_layers(model: nn.Module) -> None:
    """Let no layer be left out at random: it would have no gradient, and workers would draw different layers."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0  # type: ignore[assignment]


def parameters(model: nn.Module) -> int:
    """Count the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def fp32_bytes(model: nn.Module) -> int:
    """Count the bytes of a checkpoint in fp32: parameters, and buffers that are stored, such as `final_logits_bias`."""
    stored = model.state_dict()
    return 4 * (parameters(model) + sum(b.numel() for name, b in model.named_buffers() if name in stored))
