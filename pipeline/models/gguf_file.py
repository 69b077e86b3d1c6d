"""A GGUF file as a model, before anything is loaded from it: whether transformers reads it, and reads all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ConfigError
from pipeline.models.values import some_of

if TYPE_CHECKING:  # which take long to import
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel

ENDING = ".gguf"
NEEDS = ("gguf", "accelerate")  # transformers reads GGUF with both
# Keys behind the architecture's name that transformers leaves out for some, and the setting that each decides.
DECIDES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
SCALING = "rope.scaling."
ORIGINAL = "Name the checkpoint that the file was made from, as a folder or org/name@commit."


@contextmanager
def alone(folder: Path | str, gguf_file: str | None) -> Iterator[tuple[Path | str, dict[str, Any]]]:
    """Give the folder and settings by which transformers reads a model or tokenizer: of a GGUF file an empty folder,
    since it would read what lies beside the file as well, or a file of that name in the working directory."""
    if gguf_file is None:
        yield folder, {}
        return
    with TemporaryDirectory(prefix="bitmill-") as empty:
        yield empty, {"gguf_file": str(Path(folder).resolve() / gguf_file)}


def check_readable(path: Path, knob: str) -> None:
    """Raise ConfigError for a file that transformers cannot read: its packages are not installed, it is no GGUF file or
    a part of one, or it holds an architecture or a type of tensors that is not known."""
    missing = [package for package in NEEDS if util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{knob} is {path}, which is read with {' and '.join(missing)}, not installed here. Install the extra: "
            "pip install 'bitmill[gguf]'."
        )
    from gguf.quants import dequantize
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    reader = _reader(path, knob)
    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - {"general", "tokenizer"})
    architecture = _value(reader, "general.architecture")
    if architecture not in known:
        raise ConfigError(
            f"{knob}: {path} holds the architecture {architecture!r}, which transformers does not read from GGUF; "
            f"valid: {', '.join(known)}. {ORIGINAL}"
        )
    if (parts := _value(reader, "split.count")) is not None and parts > 1:
        raise ConfigError(
            f"{knob}: {path} is one of {parts} parts of a model. Join them once: llama-gguf-split --merge FIRST OUT."
        )
    for tensor in reader.tensors:
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise ConfigError(
                f"{knob}: {tensor.name} in {path} is of the type {tensor.tensor_type.name}, which the gguf package "
                f"cannot turn into numbers. {ORIGINAL}"
            ) from None


def check_fits(model: PreTrainedModel, path: Path, drop: bool = False) -> list[str]:
    """Return what people should know of a file that `model`, on the meta device, is to be loaded from.

    Raises:
        ConfigError: settings of the file that transformers leaves out and the model computes otherwise; tensors that
            it lacks or has in another size; or tensors that the model leaves out, unless they are to be dropped.
    """
    from transformers.integrations.gguf import GGUF_ARCHS

    reader = _reader(path, "model.source")
    architecture = _value(reader, "general.architecture")
    if architecture in GGUF_ARCHS:  # whose names transformers itself compares, when it loads them
        return []
    ignored = _ignored_settings(reader, architecture)
    _refuse_computed_otherwise(ignored, model.config, path)
    extra = _refuse_unfit(model, reader, path, drop)
    told = [f"transformers leaves out of {path}: {_listed(ignored)}."] if ignored else []
    return told + ([f"model.unused_tensors is drop: {_counted(extra, path)} are left out."] if extra else [])


def told_of_words(path: Path) -> list[str]:
    """Return what people should know of the tokenizer of a file: that transformers has no rule for how it cuts text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    reader = _reader(path, "model.tokenizer")
    kind, cut = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or cut in (None, "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS):
        return []
    return [
        f"The tokenizer of {path} cuts text by the rules {cut!r}, which transformers has not: it takes those of GPT-2, "
        "so that numbers, for one, may become other tokens. Set model.tokenizer to that of the original checkpoint."
    ]


def refuse_numbers(model: PreTrainedModel, path: Path) -> None:
    """Raise ConfigError for a loaded model whose tensors hold NaN or infinity."""
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise ConfigError(
            f"model.source: {len(broken)} tensors of {path} hold NaN or infinity: {some_of(broken)}. Fetch the file "
            "again, or name another model."
        )


def _reader(path: Path, knob: str) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ConfigError(f"{knob}: {path} is no GGUF file, or damaged or not whole: {error}.") from error


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _ignored_settings(reader: GGUFReader, architecture: str) -> dict[str, Any]:
    """Return the settings of an architecture that transformers has no name for, but for those that say nothing."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    known = {*GGUF_CONFIG_MAPPING.get(architecture, {}), "rope.dimension_count"}
    prefix = f"{architecture}."
    keys = [key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)]
    found = {key: _value(reader, prefix + key) for key in keys if key not in known}
    plain = found.get("rope.scaling.type") == "none"
    return {key: value for key, value in found.items() if not (plain and key.startswith(SCALING))}


def _refuse_computed_otherwise(ignored: dict[str, Any], config: PreTrainedConfig, path: Path) -> None:
    """Raise ConfigError for a setting of the file that the configuration made of it does not have; take those that it
    has out of `ignored`."""
    for key, value in [*ignored.items()]:
        if key in DECIDES and _has(config, DECIDES[key], value):
            del ignored[key]
        elif key in DECIDES or key.startswith(SCALING):
            raise ConfigError(
                f"model.source: {path} says that {key} is {value}, which transformers does not read: it would compute "
                f"another model. {ORIGINAL}"
            )


def _has(config: PreTrainedConfig, setting: str, value: Any) -> bool:
    """Tell whether a model computes with a value, or with what comes to the same."""
    if setting == "sliding_window" and not 0 < value < getattr(config, "max_position_embeddings", 0):
        return True
    heads = getattr(config, "num_attention_heads", 1)
    derived = {"head_dim": config.hidden_size // heads, "num_key_value_heads": heads}
    own = getattr(config, setting, None)
    own = derived.get(setting) if own is None else own
    return own is not None and not isinstance(value, list) and math.isclose(own, value, rel_tol=1e-6)


def _refuse_unfit(model: PreTrainedModel, reader: GGUFReader, path: Path, drop: bool) -> list[str]:
    """Return the names in the file of the tensors that a model leaves out of it. Raises as `check_fits`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = _value(reader, "general.architecture")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    place = get_gguf_hf_weights_map(model, processor)
    stored = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    wanted = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    lacked = sorted(wanted.keys() - {place[name] for name in stored if name in place} - tied.keys())
    other = sorted(name for name in stored if name in place and stored[name] != wanted.get(place[name], stored[name]))
    extra = sorted(stored.keys() - place.keys())
    kind = f"a {model.config.model_type} model of its settings"
    if lacked:
        raise ConfigError(f"model.source: {path} lacks {len(lacked)} tensors of {kind}: {some_of(lacked)}. {ORIGINAL}")
    if other:
        raise ConfigError(
            f"model.source: {len(other)} tensors of {path} are of another size than those of {kind}: {some_of(other)}. "
            f"{ORIGINAL}"
        )
    if extra and not drop:
        raise ConfigError(
            f"model.source: {kind} does not take {_counted(extra, path)}. Without them it is another model. {ORIGINAL} "
            "Or set model.unused_tensors: drop to leave them out; valid: refuse, drop."
        )
    return extra


def _counted(names: list[str], path: Path) -> str:
    return f"{len(names)} tensors of {path} ({some_of(names)})"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
