"""A family of models as one value, and the registry of those there are. Each file of `families/` holds one `FAMILY`:
all that tells it from the others. Nothing else needs to name it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig

AUTO = "auto"


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp has it.

    `names` maps a regular expression over module names to llama.cpp's name. `settings` gives values by the part of
    GGUFWriter's method behind `add_`. `rotary` names, by the last part of a module's name, the setting that counts its
    heads: llama.cpp has the rotary pairs of a head side by side, transformers half a head apart. `requires` are
    settings of config.json that llama.cpp computes with, and `refuses` says what else it cannot do.
    """

    architecture: str
    names: Mapping[str, str]
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    requires: Mapping[str, Any] = field(default_factory=dict)
    rotary: Mapping[str, str] = field(default_factory=dict)
    refuses: Callable[[PreTrainedConfig], str] = lambda config: ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module names of one transformers architecture, and what other formats make of it. `linears` maps a regular
    expression over module names to whether the layer's input is quantized symmetrically."""

    name: str  # transformers' model_type
    linears: tuple[tuple[str, bool], ...]
    embedding: str
    tied_embeddings: tuple[str, ...] = ()  # further names of the embedding's table
    unquantized: tuple[str, ...] = ()  # modules with a weight that stay in full precision
    head: str = "lm_head"
    encoder_decoder: bool = False
    graph: str = ""  # the module of `pipeline.runtime` that draws it for ONNX Runtime
    gguf: Gguf | None = None
    compressed_tensors: str = ""  # modules that vLLM reads packed, as a regular expression

    @property
    def formats(self) -> tuple[str, ...]:
        """Return the export formats that exist for the family."""
        known = {"onnx": self.graph, "gguf": self.gguf, "compressed-tensors": self.compressed_tensors}
        return ("transformers", *(name for name, support in known.items() if support))


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Return every family by its name: one a file of `pipeline/models/families/`."""
    from pipeline.models import families as folder

    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    modules = [import_module(f"{folder.__name__}.{name}") for name in names]
    return {module.FAMILY.name: module.FAMILY for module in modules}


def family_named(name: str) -> Family:
    """Return a family. Raises ConfigError for a name that is none."""
    if name not in families():
        raise ConfigError(f"model.family is {name!r}; valid: {AUTO}, {', '.join(families())}")
    return families()[name]


def family_for(model_type: str, requested: str = AUTO) -> Family:
    """Return the family of a model by transformers' `model_type`, or the one that is asked for. Raises ConfigError for
    a model whose layers are unknown, or a name that is no family."""
    if requested != AUTO:
        return family_named(requested)
    if model_type not in families():
        raise ConfigError(
            f"model: the layers of a {model_type!r} model are not known; known families: {', '.join(families())}. "
            "If it has the modules of one of these, say so with model.family."
        )
    return families()[model_type]


def family_with(support: str, model_type: str) -> Family | None:
    """Return the family of exactly this `model_type` if it has `support`, a field of `Family` such as graph. A model
    that was taken under another family's name has its modules, but may order or compute them otherwise."""
    family = families().get(model_type)
    return family if family is not None and getattr(family, support) else None


def names_with(support: str) -> list[str]:
    """Return the names of the families that have `support`."""
    return [name for name, family in families().items() if getattr(family, support)]
