"""A family of models as one value, and the registry of those there are. Each file of `families/` holds one `FAMILY`:
all that tells it from the others. Nothing else needs to name it."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.blocks import Blocks, Sides

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A family as llama.cpp has it: what its architecture computes that a configuration may say otherwise, so that such
    a model is refused."""

    architecture: str
    activations: tuple[str, ...] = ("silu", "swish")
    side_by_side: bool = False  # pairs of a rotary turn lie side by side there, half a head apart in transformers
    window_every: int = 0  # layers of which the last attends to all tokens, the others to a window
    unturned_every: int = 0  # layers of which the last knows no positions
    scales_angles: tuple[str, ...] = ("linear", "yarn")  # kinds of rotary angles beside plain ones
    divides_angles: bool = False  # takes a divisor of each angle, which makes those of llama3
    angles_in_window: float = 0.0  # rope_theta of layers with a window, where it is not that of the others
    capped: bool = False  # scores and logits are capped, and not may
    scaled: bool = False  # takes numbers that multiply embedding, scores, what layers add, and logits
    requires: Mapping[str, Any] = field(default_factory=dict)  # settings of config.json
    largest: int = 0  # a number of layers with which scores are scaled as if a head's size were hidden size / heads


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module names of one transformers architecture, and what other formats make of it. `linears` maps a regular
    expression over module names to whether the layer's input is quantized symmetrically: see `decoder_only`."""

    name: str  # transformers' model_type
    linears: tuple[tuple[str, bool], ...]
    embedding: str
    blocks: Blocks | None = None  # of a decoder alone
    sides: Sides | None = None
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


def decoder_only(name: str, blocks: Blocks, linears: tuple[tuple[str, bool], ...] = (), **support: Any) -> Family:
    """Return the family of a decoder alone; `linears` are those outside of its layers, `support` other fields."""
    unquantized = (blocks.positions,) if blocks.positions else ()
    return Family(
        name=name,
        linears=(*blocks.linears, *linears),
        embedding=blocks.embedding,
        blocks=blocks,
        unquantized=unquantized,
        graph="decoder_only",
        **support,
    )


def encoder_decoder(name: str, sides: Sides) -> Family:
    """Return the family of an encoder and a decoder over one table of words."""
    both = (sides.encoder, sides.decoder)
    tables = [f"{side.layers}.0.{side.relative}" if side.relative else side.positions for side in both]
    return Family(
        name=name,
        linears=(*sides.encoder.linears, *sides.decoder.linears),
        embedding=sides.table,
        tied_embeddings=tuple(side.embedding for side in both),
        unquantized=tuple(tables),
        encoder_decoder=True,
        sides=sides,
        graph="encoder_decoder",
    )


def like_bart(name: str, first_position: int = 2, normed_embedding: bool = True, **computes: bool) -> Family:
    """Return the family of an encoder and a decoder whose modules are called as BART's. `first_position` is a row of
    the table of positions, `computes` what `Sides` says of how they compute."""

    def side(named: str, **more: Any) -> Blocks:
        return Blocks(
            layers=f"model.{named}.layers",
            embedding=f"model.{named}.embed_tokens",
            positions=f"model.{named}.embed_positions",
            first_position=first_position,
            embedding_norm=f"model.{named}.layernorm_embedding" if normed_embedding else "",
            last_norm=f"model.{named}.layer_norm",
            out="self_attn.out_proj",
            into_mlp=("fc1",),
            gated=False,
            out_of_mlp="fc2",
            before_attention="self_attn_layer_norm",
            before_mlp="final_layer_norm",
            activation="activation_function",
            epsilon="",
            **more,
        )

    to_encoder = {"cross": tuple(f"encoder_attn.{part}_proj" for part in "qkv"), "cross_out": "encoder_attn.out_proj"}
    decoder = side("decoder", before_cross="encoder_attn_layer_norm", **to_encoder)
    return encoder_decoder(name, Sides(encoder=side("encoder"), decoder=decoder, table="model.shared", **computes))


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Return every family by its name: one a file of `pipeline/models/families/`."""
    from pipeline.models import families as folder

    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    modules = [import_module(f"{folder.__name__}.{name}") for name in names]
    return {module.FAMILY.name: module.FAMILY for module in modules}


# Any other decoder alone, whose modules `student.walked` names: its matrices are found, and told in the plan.
WALKED = Family(name="walked", linears=((".*", True),), embedding="")


def family_named(name: str) -> Family:
    """Return a family. Raises ConfigError for a name that is none."""
    known = {**families(), WALKED.name: WALKED}
    if name not in known:
        raise ConfigError(f"model.family is {name!r}; valid: {AUTO}, {', '.join(families())}")
    return known[name]


def family_for(model_type: str, requested: str = AUTO) -> Family:
    """Return the family of a model by transformers' `model_type`, or the one that is asked for; WALKED for a model of
    none. Raises ConfigError for a name that is no family."""
    return families().get(model_type, WALKED) if requested == AUTO else family_named(requested)


def family_with(support: str, model_type: str) -> Family | None:
    """Return the family of exactly this `model_type` if it has `support`, a field of `Family` such as graph. A model
    that was taken under another family's name has its modules, but may order or compute them otherwise."""
    family = families().get(model_type)
    return family if family is not None and getattr(family, support) else None


def names_with(support: str) -> list[str]:
    """Return the names of the families that have `support`."""
    return [name for name, family in families().items() if getattr(family, support)]
