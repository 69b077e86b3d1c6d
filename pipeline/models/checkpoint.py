"""A checkpoint's folder before anything is loaded from it: what it is, and whether its tensors are the model's. Names
and shapes come from the headers of its files; values are read only of two tables that should be one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import ConfigError
from pipeline.models.values import blocks_of, some_of

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Part of every tensor's name after a model was saved inside of what it was trained in.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel or DeepSpeed",
}
REFUSE, DROP = "refuse", "drop"  # values of model.unused_tensors


@dataclass(frozen=True)
class Stored:
    """A tensor as a header tells of it."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


def refuse_other_folders(folder: Path, knob: str) -> None:
    """Raise ConfigError, with what makes a checkpoint of it, for a folder that holds an adapter, pickled weights alone,
    or an index whose files are not all there."""
    if (folder / ADAPTER).exists():
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
        raise ConfigError(
            f"{knob}: {folder} holds a PEFT adapter of {base!r} ({ADAPTER}), which is what was added to that model and "
            "no model of its own. Merge the two and name the merged folder (with pip install peft): "
            f'python -c "from peft import {_auto(folder, "AutoPeft")} as M; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\""
        )
    if (folder / WEIGHTS).exists():
        return
    if (folder / INDEX).exists():
        missing = [path.name for path in weight_files(folder) if not path.exists()]
        if missing:
            raise ConfigError(
                f"{knob}: {folder} lacks {len(missing)} of the files that {INDEX} lists: {some_of(missing)}. Bring "
                "them there, or name a folder that is whole."
            )
        return
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ConfigError(
            f"{knob}: {folder} holds {some_of(others)}, and transformers reads {WEIGHTS}, or the files that {INDEX} "
            "lists. Rename it, or convert it with the script of the model's makers."
        )
    pickled = sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})
    advice = (
        f" It holds pickled weights ({some_of(pickled)}), which may run code and are not loaded. Convert them once, "
        f'if you trust where they come from: python -c "from transformers import {_auto(folder)} as M; '
        f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
    )
    raise ConfigError(
        f"{knob}: {folder} holds no *.safetensors."
        + (advice if pickled else f" Valid: a folder with config.json and {WEIGHTS}, as save_pretrained writes it.")
    )


def refuse_quantized(config: PreTrainedConfig, knob: str, where: Path | str) -> None:
    """Raise ConfigError for a model whose weights are quantized already."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = dict(quantization if isinstance(quantization, dict) else quantization.to_dict()).get("quant_method")
    advice = (
        f"bitmill export {where} --format transformers --out DIR"
        if method == "bitmill"
        else f'python -c "from transformers import {_auto(config)} as M; '
        f"M.from_pretrained('{where}').dequantize().save_pretrained('DIR')\" where transformers can dequantize {method}"
    )
    raise ConfigError(
        f"{knob} is {where}, whose config.json has a quantization_config of {method!r}: its weights are quantized, "
        "and a teacher is a model in floating point. Name the model that it was quantized from, or dequantize it once: "
        f"{advice}."
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads from a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    listed = _json(folder / INDEX).get("weight_map")
    return [folder / name for name in sorted(set(map(str, listed.values())))] if isinstance(listed, dict) else []


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder by name, from the headers of its files. Raises ConfigError for a damaged file."""
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    tensors[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.source: {path} is damaged or not whole: {error}. Fetch or write it again."
            ) from error
    return tensors


def check_tensors_fit(model: PreTrainedModel, folder: Path, unused: str = REFUSE) -> tuple[str, ...]:
    """Return the names of the tensors that a folder holds and `model`, on the meta device, leaves out. Nothing but
    headers is read; which tensor goes where is decided by transformers.

    Raises:
        ConfigError: tensors that it lacks, or has in another shape; or too many, unless `unused` is to be dropped.
    """
    stored = stored_tensors(folder)
    blank = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    _, loading = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=blank,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return refuse_unfit(model, loading, folder, unused)


def refuse_unfit(model: PreTrainedModel, loading: Mapping[str, Any], folder: Path, unused: str) -> tuple[str, ...]:
    """Return the names of the tensors that a model leaves out of a folder, by what transformers tells of loading it.
    Raises as `check_tensors_fit`."""
    stored = stored_tensors(folder)
    _refuse_wrapped(stored, folder)
    _refuse_adapted(stored, folder)
    _refuse_missing(model, loading["missing_keys"], folder)
    _refuse_shapes(model, loading["mismatched_keys"], folder)
    extra = (*sorted(loading["unexpected_keys"]), *_second_tables(model, stored))
    _refuse_unused(model, extra, folder, unused)
    return extra


def _refuse_wrapped(names: Iterable[str], folder: Path) -> None:
    """Raise ConfigError for names that a wrapper gave to all tensors of a model, and not its own."""
    parts = {name: name.split(".") for name in names}
    for wrapper, made_by in WRAPPERS.items():
        outermost = wrapper == "module"  # which may be a name of the model's own further inside
        wrapped = [name for name, split in parts.items() if wrapper in (split[:1] if outermost else split)]
        if not wrapped:
            continue
        renamed = f"k.removeprefix('{wrapper}.')" if outermost else f"k.replace('{wrapper}.', '')"
        raise ConfigError(
            f"model.source: the names of {len(wrapped)} of {len(parts)} tensors in {folder} hold {wrapper!r}, such as "
            f"{wrapped[0]}: the model was saved inside of what {made_by} puts around it. Save the model within, or "
            'rename them once: python -c "from glob import glob; from safetensors.torch import load_file, save_file; '
            f"[save_file({{{renamed}: v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}}) "
            f"for f in glob('{folder}/*.safetensors')]\""
        )


def _refuse_adapted(names: Iterable[str], folder: Path) -> None:
    """Raise ConfigError for tensors of an adapter beside those of the model."""
    adapted = sorted(name for name in names if ".lora_" in name)
    if adapted:
        raise ConfigError(
            f"model.source: {len(adapted)} tensors in {folder} are of a LoRA adapter: {some_of(adapted)}. Load it as "
            "it was trained, merge the adapter into the model (PEFT's merge_and_unload), and save that."
        )


def _refuse_missing(model: PreTrainedModel, missing: Iterable[str], folder: Path) -> None:
    """Raise ConfigError for tensors that a folder lacks."""
    lacked = sorted(missing)
    if not lacked:
        return
    tables = [name for name in lacked if name in (getattr(model, "_tied_weights_keys", None) or {})]
    reason = (
        "config.json says tie_word_embeddings: false, and there is no table of the head's own. Set "
        "tie_word_embeddings: true there if the model was trained with one table for both."
        if lacked == tables
        else "They would be random numbers. Name a folder that is whole."
    )
    raise ConfigError(
        f"model.source: the model in {folder} lacks {len(lacked)} tensors that a {model.config.model_type} model of "
        f"its config.json has: {some_of(lacked)}. {reason}"
    )


def _refuse_shapes(
    model: PreTrainedModel, mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]], folder: Path
) -> None:
    """Raise ConfigError for tensors of another shape than the model's: (name, shape in the file, in the model)."""
    wrong = sorted((name, tuple(theirs), tuple(ours)) for name, theirs, ours in mismatched)
    if not wrong:
        return
    name, theirs, ours = wrong[0]
    table = ours[0] == getattr(model.config, "vocab_size", None) and ours[1:] == theirs[1:]
    raise ConfigError(
        f"model.source: {len(wrong)} tensors in {folder} have another shape than config.json gives a "
        f"{model.config.model_type} model: {name} is {theirs}, not {ours}. "
        + (
            f"Set vocab_size in config.json to the table's {theirs[0]} rows."
            if table
            else "Bring the config.json and the weights of one and the same model."
        )
    )


def _refuse_unused(model: PreTrainedModel, extra: tuple[str, ...], folder: Path, unused: str) -> None:
    """Raise ConfigError for tensors that the model would leave out, unless they are to be dropped."""
    if not extra or unused == DROP:
        return
    reason = (
        " config.json says tie_word_embeddings: true, and the two tables differ: set it to false there, if the model "
        "was trained with two."
        if any(name in _tied(model) for name in extra)
        else ""
    )
    raise ConfigError(
        f"model.source: a {model.config.model_type} model of this config.json does not take {len(extra)} tensors of "
        f"{folder}: {some_of(extra)}. Without them it is another model than the one that was saved.{reason} Mend "
        "config.json, or set model.unused_tensors: drop to leave them out; valid: refuse, drop."
    )


def _second_tables(model: PreTrainedModel, stored: Mapping[str, Stored]) -> list[str]:
    """Return the tensors that config.json ties to another one of the folder, and that hold other numbers than it."""
    prefix = f"{model.base_model_prefix}."  # which checkpoints of the base model leave out

    def name_of(tensor: str) -> str | None:
        return next((name for name in (tensor, tensor.removeprefix(prefix)) if name in stored), None)

    pairs = [(name_of(target), name_of(source)) for target, source in _tied(model).items()]
    return [target for target, source in pairs if target and source and not _equal(stored, target, source)]


def _equal(stored: Mapping[str, Stored], first: str, second: str) -> bool:
    if stored[first].shape != stored[second].shape:
        return False
    with safe_open(stored[first].file, "pt") as first_file, safe_open(stored[second].file, "pt") as second_file:
        blocks = (blocks_of(first_file, first), blocks_of(second_file, second))
        return all(torch.equal(a, b) for a, b in zip(*(block or iter(()) for block in blocks), strict=True))


def _tied(model: PreTrainedModel) -> dict[str, str]:
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def _auto(of: Path | PreTrainedConfig, start: str = "Auto") -> str:
    """Return the auto class of a folder's model or a configuration."""
    encodes = _json(of / "config.json").get("is_encoder_decoder") if isinstance(of, Path) else of.is_encoder_decoder
    return f"{start}ModelFor{'Seq2SeqLM' if encodes else 'CausalLM'}"


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
