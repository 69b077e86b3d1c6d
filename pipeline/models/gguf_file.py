"""A GGUF file as a model, before anything is loaded from it: whether transformers reads it, and reads all of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.models.values import some_of

if TYPE_CHECKING:  # which take long to import
    from gguf import GGMLQuantizationType
    from transformers import PreTrainedConfig, PreTrainedModel

ENDING = ".gguf"
NEEDS = ("gguf", "accelerate")  # transformers reads GGUF with both
# By their names in a file, those of which tests show that transformers makes the model that was written.
ARCHITECTURES = ("gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3")
# Keys behind the architecture's name, and the setting that each decides: transformers leaves them out for some.
DECIDES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "rotary size of a head",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_theta of windows",
    "vocab_size": "vocab_size",
}
SCALING, SCALED = "rope.scaling.", "rope.scale_linear"  # and what files of 2023 have
READ = {  # what is read of angles of a kind, behind SCALING; `finetuned` decides nothing
    "linear": ("type", "factor", "original_context_length", "finetuned"),
    "yarn": ("type", "factor", "original_context_length", "finetuned", "attn_factor"),
}
ORIGINAL = "Name the checkpoint that the file was made from, as a folder or org/name@commit."
# What a header may declare: more than any model has, and little enough for the memory of those who read it.
MOST_ENTRIES, MOST_ELEMENTS, MOST_LAYERS, MOST_DIMENSIONS = 2**16, 2**22, 1000, 4
TEXT, ARRAY = 8, 9  # kinds of values that have a length; of the others, the bytes:
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
VERSIONS = (2, 3)
DAMAGED = (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, OSError),
    *(NotImplementedError, struct.error),
)


class Header(NamedTuple):
    """What a file says of its model: settings by key, without the tokenizer's tables, and tensors in their order, each
    a name, a type and a number of elements."""

    settings: dict[str, Any]
    tensors: tuple[tuple[str, GGMLQuantizationType, int], ...]


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
    """Raise ConfigError for a file that is not read: the packages for it are not installed, it is no GGUF file or a
    part of one, or it holds another architecture than `ARCHITECTURES` or a type of tensors that is not known."""
    missing = [package for package in NEEDS if util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{knob} is {path}, which is read with {' and '.join(missing)}, not installed here. Install the extra: "
            "pip install 'bitmill[gguf]'."
        )
    with _guarded(path, knob):
        header = _header(path)
        architecture = header.settings.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{knob}: {path} is of the architecture {architecture!r}, and GGUF files of that are not read; valid: "
                f"{', '.join(ARCHITECTURES)}. {ORIGINAL}"
            )
        if (parts := header.settings.get("split.count")) not in (None, 0, 1):
            raise ConfigError(
                f"{knob}: {path} is one of {parts!r} parts of a model. Join them once: llama-gguf-split --merge FIRST "
                "OUT."
            )
        if not 0 < (layers := header.settings[f"{architecture}.block_count"]) <= MOST_LAYERS:
            raise ValueError(f"{architecture}.block_count is {layers}; valid: 1 to {MOST_LAYERS}")
        _refuse_unknown_types(header, path, knob)


def _refuse_unknown_types(header: Header, path: Path, knob: str) -> None:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for name, kind, _ in header.tensors:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ConfigError(
                f"{knob}: {name} in {path} is of the type {kind.name}, which the gguf package cannot turn into "
                f"numbers. {ORIGINAL}"
            ) from None


def check_fits(model: PreTrainedModel, path: Path, drop: bool = False) -> tuple[list[str], list[str]]:
    """Return what people should know of a file that `model`, on the meta device, is to be loaded from, and the names in
    the file of the tensors that the model leaves out.

    Raises:
        ConfigError: settings of the file that transformers leaves out and the model computes otherwise; tensors that
            it lacks or has in another size; or tensors that the model leaves out, unless they are to be dropped.
    """
    with _guarded(path, "model.source"):
        header = _header(path)
        settings = _settings(header)
        _refuse_computed_otherwise(settings, model.config, path)
        ignored = _ignored(settings, header.settings["general.architecture"])
        extra = _refuse_unfit(model, header, path, drop)
    return [f"transformers leaves out of {path}: {_listed(ignored)}."] if ignored else [], extra


def scale_angles(config: PreTrainedConfig, path: Path) -> None:
    """Give a configuration the rotary angles that its file says, in place, as llama.cpp computes them (ggml's
    `rope_yarn`): transformers reads none of that. `check_fits` refuses what is not read here either."""
    scaling, angles = _scaling(_settings(_header(path))), getattr(config, "rope_parameters", None)
    if not _is_read(scaling) or not angles:
        return
    kind, factor, full = scaling["type"], float(scaling["factor"]), angles.get("full_attention", angles)
    full |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        full["original_max_position_embeddings"] = int(
            scaling.get("original_context_length", config.max_position_embeddings)
        )
        full["attention_factor"] = scaling.get("attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))


def _scaling(settings: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(SCALING): value for key, value in settings.items() if key.startswith(SCALING)}


def _is_read(scaling: dict[str, Any]) -> bool:
    return "factor" in scaling and scaling.keys() <= {*READ.get(scaling.get("type", ""), ())}


def told_of_words(path: Path) -> list[str]:
    """Return what people should know of the tokenizer of a file: that transformers has no rule for how it cuts text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    with _guarded(path, "model.tokenizer"):
        settings = _header(path).settings
    kind, cut = settings.get("tokenizer.ggml.model"), settings.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut in (None, "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS):
        return []
    return [
        f"The tokenizer of {path} cuts text by the rules {cut!r}, which transformers has not: it takes those of GPT-2, "
        "so that numbers, for one, may become other tokens. Set model.tokenizer to that of the original checkpoint."
    ]


@contextmanager
def _guarded(path: Path, knob: str) -> Iterator[None]:
    """Turn whatever a header that is not what it should be leads to into a ConfigError."""
    try:
        yield
    except DAMAGED as error:
        raise ConfigError(f"{knob}: {path} is no GGUF file, or damaged or not whole: {error}.") from error


def _header(path: Path) -> Header:
    """Return the header of a file, which is read once for as long as the file stays as it is."""
    state = path.stat()
    return _read_header(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_header(path: Path, size: int, mtime_ns: int) -> Header:
    from gguf import GGUFReader, GGUFValueType

    with path.open("rb") as file:
        _Lengths(file, size).check()
    reader = GGUFReader(path)
    tables = {
        key
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.") and field.types[:1] == [GGUFValueType.ARRAY]
    }
    return Header(
        {key: field.contents() for key, field in reader.fields.items() if key not in tables},
        tuple((tensor.name, tensor.tensor_type, int(tensor.n_elements)) for tensor in reader.tensors),
    )


class _Lengths:
    """The lengths that a header declares, held against the file before those read it who would take memory for all that
    is declared, or stop with an error of their own. Layout: ggml's docs/gguf.md."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.elements = file, size, 0

    def check(self) -> None:
        """Raise ValueError or struct.error for a header that the file has no room for, or no model needs."""
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"its version is {version}; valid: {', '.join(map(str, VERSIONS))}")
        tensors, settings = self.number("Q"), self.number("Q")
        if max(tensors, settings) > MOST_ENTRIES:
            raise ValueError(f"it declares {tensors} tensors and {settings} settings; valid: up to {MOST_ENTRIES}")
        for _ in range(settings):
            self.text()
            self.value(self.number("I"))
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("I")
            if not 0 < dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions; valid: 1 to {MOST_DIMENSIONS}")
            self.skip(8 * dimensions + 4 + 8)  # sizes, type, place

    def number(self, layout: str) -> int:
        """Read one whole number."""
        (number,) = struct.unpack(f"<{layout}", self.file.read(struct.calcsize(f"<{layout}")))
        return int(number)

    def text(self) -> str:
        """Read a string."""
        return self.file.read(self.within(self.number("Q"))).decode("utf-8")

    def value(self, kind: int) -> None:
        """Pass over a value."""
        if kind == TEXT:
            self.text()
        elif kind != ARRAY:
            self.skip(WIDTHS[kind])
        else:
            inner, count = self.number("I"), self.number("Q")
            self.elements += count
            if inner == ARRAY:
                raise ValueError("it holds arrays of arrays")
            if self.elements > MOST_ELEMENTS:
                raise ValueError(f"its arrays have {self.elements} elements; valid: up to {MOST_ELEMENTS}")
            for _ in range(count):
                self.value(inner)

    def skip(self, length: int) -> None:
        """Pass over so many bytes."""
        self.file.seek(self.within(length), 1)

    def within(self, length: int) -> int:
        """Return a length that the file has room for."""
        if length > (left := self.size - self.file.tell()):
            raise ValueError(f"it declares {length} bytes where {left} are left")
        return length


def _settings(header: Header) -> dict[str, Any]:
    """Return the settings of the file's architecture, but for those that say nothing."""
    prefix = f"{header.settings['general.architecture']}."
    settings = {key.removeprefix(prefix): value for key, value in header.settings.items() if key.startswith(prefix)}
    plain = settings.get("rope.scaling.type") == "none"
    return {key: value for key, value in settings.items() if not (plain and key.startswith(SCALING))}


def _ignored(settings: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return what transformers has no name for and nothing was compared with."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    named = GGUF_CONFIG_MAPPING[architecture].keys() | DECIDES.keys()
    return {key: value for key, value in settings.items() if key not in named and not key.startswith(SCALING)}


def _refuse_computed_otherwise(settings: dict[str, Any], config: PreTrainedConfig, path: Path) -> None:
    """Raise ConfigError for a setting of the file that the configuration made of it does not have."""
    scaled = _is_read(_scaling(settings)) and bool(getattr(config, "rope_parameters", None))
    for key, value in settings.items():
        reason = ""
        if key == SCALED or (key.startswith(SCALING) and not scaled):
            reason = f"and angles are read that are plain, {' or '.join(READ)} alone"
        elif key in DECIDES and not _same(own := _own(config, DECIDES[key]), value, config, key):
            reason = f"and transformers takes {DECIDES[key]} {own}"
        if reason:
            raise ConfigError(
                f"model.source: {path} says that {key} is {value}, {reason}: it would compute another model. {ORIGINAL}"
            )


def _own(config: PreTrainedConfig, setting: str) -> float | None:
    """Return what a model computes with."""
    heads = getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    angles: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full = angles.get("full_attention", angles)
    derived = {
        "head_dim": head,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "rotary size of a head": int(head * full.get("partial_rotary_factor", 1.0)),
        "rope_theta": full.get("rope_theta"),
        "rope_theta of windows": angles.get("sliding_attention", angles).get("rope_theta"),
    }
    return derived[setting] if setting in derived else getattr(config, setting, None)


def _same(own: float | None, value: Any, config: PreTrainedConfig, key: str) -> bool:
    """Tell whether a model computes with a value of the file, or with what comes to the same."""
    if not isinstance(value, int | float):
        return False
    if key == "attention.sliding_window" and not 0 < value < getattr(config, "max_position_embeddings", 0):
        return True
    return own is not None and math.isclose(own, value, rel_tol=1e-6)


def _refuse_unfit(model: PreTrainedModel, header: Header, path: Path, drop: bool) -> list[str]:
    """Return the names in the file of the tensors that a model leaves out of it. Raises as `check_fits`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = header.settings["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    place = get_gguf_hf_weights_map(model, processor)
    stored = {name: elements for name, _, elements in header.tensors}
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
            f"model.source: {kind} does not take {counted(extra, path)}. Without them it is another model. {ORIGINAL} "
            "Or set model.unused_tensors: drop to leave them out; valid: refuse, drop."
        )
    return extra


def counted(names: list[str], path: Path) -> str:
    """Say how many tensors of a file they are, and some of their names."""
    return f"{len(names)} tensors of {path} ({some_of(names)})"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
