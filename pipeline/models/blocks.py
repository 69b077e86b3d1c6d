"""Models in the terms that those of a kind share. Of a decoder alone: names of the parts of a layer, and the numbers
that its layers compute with. With an encoder: what differs from BART. From these a student is made, a graph drawn, and
a file written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")
INNER = ("intermediate_size", "ffn_dim", "n_inner")
EPSILON = 1e-5  # torch's own, of norms whose configuration has none


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Names of a decoder's parts, those of a layer within it; an empty one is of a part that the family lacks. What is
    written here is Llama's."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = ""  # a table of learned positions, the first of which is row `first_position`
    first_position: int = 0
    last_norm: str = "model.norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one of all three
    by_head: bool = False  # in one of all three, each head's queries, keys and values lie together
    out: str = "self_attn.o_proj"
    into_mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one of both
    gated: bool = True
    out_of_mlp: str = "mlp.down_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""  # of what attention gives, before it is added
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    of_queries: str = ""  # norms of each head, or of all heads together
    of_keys: str = ""
    norm_offset: float = 0.0  # added to the weight of every norm
    scaled_embedding: bool = False  # by the root of the hidden size
    capped_attention: bool = False  # scores by attn_logit_softcapping
    refuses: Callable[[PreTrainedConfig], str] = lambda config: ""  # names what these terms do not cover

    @property
    def linears(self) -> tuple[tuple[str, bool], ...]:
        """Return the linear layers as `Family.linears` has them. What follows a gate has both signs; what follows an
        activation alone is not symmetric."""
        both_signs = (*self.qkv, self.out, *self.into_mlp, *([self.out_of_mlp] if self.gated else []))
        kinds = [(both_signs, True), (() if self.gated else (self.out_of_mlp,), False)]
        return tuple((rf"{_exactly(self.layers)}\.\d+\.({'|'.join(map(_exactly, n))})", s) for n, s in kinds if n)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the layers of a model compute with. `windows` has the tokens that each layer attends to, 0 for all of them;
    `rotary` the name of each layer's rotary angles, None where it turns nothing."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int  # width of the MLP
    epsilon: float
    activation: str
    attention_scale: float
    attention_cap: float
    windows: tuple[int, ...]
    rotary: tuple[str | None, ...]
    embedding_scale: float
    residual_scale: float
    logit_divisor: float
    logit_cap: float
    parallel: bool  # attention and MLP read the same states, and both are added to them


@dataclass(frozen=True, kw_only=True)
class Sides:
    """How an encoder and a decoder whose modules are called as BART's compute. What is written here is BART's."""

    norm_first: bool = False  # a part of a layer reads what was normed, and a last norm ends each side
    normed_embedding: bool = True
    first_position: int = 2  # row of the table of positions
    computed_positions: bool = False  # that table is no tensor, and begins after the row of the padding token


def numbers_of(config: PreTrainedConfig, blocks: Blocks) -> Numbers:
    """Return what a configuration says of a family's layers, by the names that transformers' configurations share."""
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or [""] * layers
    window = int(getattr(config, "sliding_window", None) or 0)
    angles = getattr(config, "rope_parameters", None) or {}
    turned = getattr(config, "no_rope_layers", None) or [1] * layers
    return Numbers(
        layers=layers,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=head_size,
        inner=int(_first(config, INNER, 4 * config.hidden_size)),
        epsilon=float(_first(config, EPSILONS, EPSILON)),
        activation=str(_first(config, ACTIVATIONS, "")),
        attention_scale=_attention_scale(config, head_size),
        attention_cap=float(getattr(config, "attn_logit_softcapping", None) or 0) if blocks.capped_attention else 0.0,
        windows=tuple(window if kind in ("", "sliding_attention") else 0 for kind in kinds),
        rotary=tuple(
            None if blocks.positions or not turns else (kind if kind in angles else "")
            for kind, turns in zip(kinds, turned, strict=True)
        ),
        embedding_scale=config.hidden_size**0.5
        if blocks.scaled_embedding
        else float(getattr(config, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logit_divisor=float(getattr(config, "logits_scaling", 1.0)),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
    )


def rope_types(config: PreTrainedConfig) -> set[str]:
    """Return the kinds of rotary angles of a configuration, such as default or yarn."""
    angles: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [value for value in angles.values() if isinstance(value, dict)] or ([angles] if angles else [])
    return {str(value.get("rope_type", "default")) for value in each}


def _attention_scale(config: PreTrainedConfig, head_size: int) -> float:
    multiplier = getattr(config, "attention_multiplier", None)
    if multiplier is not None:
        return float(multiplier)
    return float((getattr(config, "query_pre_attn_scalar", None) or head_size) ** -0.5)


def _first(config: PreTrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")
