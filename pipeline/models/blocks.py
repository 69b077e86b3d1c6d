"""Models in the terms that those of a kind share: names of the parts of a layer, of a decoder alone or of each side of
an encoder and a decoder, and the numbers that layers compute with. From these a student is made, a graph drawn, and a
file written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig

DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
ENCODER_LAYERS = ("encoder_layers", "num_hidden_layers")
EPSILON = 1e-5  # torch's own, of norms whose configuration has none
LONGEST = 4096  # tokens of a text whose positions are relative, and have no end


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Names of a decoder's parts, or of an encoder's, those of a layer within it; an empty one is of a part that the
    family lacks. What is written here is Llama's."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = ""  # a table of learned positions, the first of which is row `first_position`
    first_position: int = 0
    relative: str = ""  # in the first layer, a table of what each distance between tokens adds to scores, in all layers
    embedding_norm: str = ""
    last_norm: str = "model.norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one of all three
    by_head: bool = False  # in one of all three, each head's queries, keys and values lie together
    out: str = "self_attn.o_proj"
    into_mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one of both
    gated: bool = True
    ungated: str = ""  # the matrix into the MLP of those models of the family that have no gate
    out_of_mlp: str = "mlp.down_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""  # of what attention gives, before it is added
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    of_queries: str = ""  # norms of each head, or of all heads together
    of_keys: str = ""
    cross: tuple[str, ...] = ()  # queries of a decoder, and keys and values of what its encoder gives
    cross_out: str = ""
    before_cross: str = ""
    norm_offset: float = 0.0  # added to the weight of every norm
    scaled_embedding: bool = False  # by the root of the hidden size
    capped_attention: bool = False  # scores by attn_logit_softcapping
    activation: str = "hidden_act"  # the setting of config.json that names it
    epsilon: str = "rms_norm_eps"  # the setting of the norms'; empty: torch's own
    inner: str = "intermediate_size"  # the setting of the MLP's width; null there: four times the hidden size
    refuses: Callable[[PreTrainedConfig], str] = lambda config: ""  # names what these terms do not cover

    @property
    def linears(self) -> tuple[tuple[str, bool], ...]:
        """Return the linear layers as `Family.linears` has them. What follows a gate has both signs; what follows an
        activation alone is not symmetric."""
        gated = self.gated and not self.ungated
        attention = (*self.qkv, self.out, *self.cross, *filter(None, [self.cross_out]))
        both_signs = (*attention, *self.into_mlp, *filter(None, [self.ungated, self.out_of_mlp if gated else ""]))
        kinds = [(both_signs, True), (() if gated else (self.out_of_mlp,), False)]
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
    """An encoder and a decoder over one table of words, and how they compute. Names that begin with `before` are of the
    norm of a part of a layer, which reads what was normed, or whose sum with its input is normed."""

    encoder: Blocks
    decoder: Blocks
    table: str  # the module of it; each side has a further name for it
    norm_first: bool = False  # and a last norm ends each side
    computed_positions: bool = False  # their table is no tensor, and begins after the row of the padding token
    divided_scores: bool = True  # by the root of the size of a head


@dataclass(frozen=True, kw_only=True)
class SideNumbers:
    """What the layers of an encoder or a decoder compute with, and how many tokens either reads."""

    layers: int
    heads: int
    head_size: int
    epsilon: float
    activation: str
    gated: bool
    attention_scale: float
    embedding_scale: float
    logit_divisor: float
    longest: int


def numbers_of(config: PreTrainedConfig, blocks: Blocks) -> Numbers:
    """Return what a configuration says of a family's layers, by the settings that the family names and those that
    transformers' configurations share."""
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
        inner=int(getattr(config, blocks.inner) or 4 * config.hidden_size),
        epsilon=_epsilon(config, blocks),
        activation=str(getattr(config, blocks.activation)),
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
        logit_divisor=logit_divisor_of(config),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
    )


def numbers_of_side(config: PreTrainedConfig, sides: Sides, side: str) -> SideNumbers:
    """Return what a configuration says of the layers of one side, `encoder` or `decoder`."""
    encoder_layers, decoder_layers = depth_of(config)
    heads = int(_first(config, (f"{side}_attention_heads", "num_attention_heads"), 0))
    head_size = int(getattr(config, "d_kv", None) or config.d_model // heads)
    return SideNumbers(
        layers=encoder_layers if side == "encoder" else decoder_layers,
        heads=heads,
        head_size=head_size,
        epsilon=_epsilon(config, sides.decoder),
        activation=str(getattr(config, sides.decoder.activation)),
        gated=sides.decoder.gated and bool(getattr(config, "is_gated_act", True)),
        attention_scale=head_size**-0.5 if sides.divided_scores else 1.0,
        embedding_scale=config.d_model**0.5 if getattr(config, "scale_embedding", False) else 1.0,
        logit_divisor=logit_divisor_of(config),
        longest=positions_of(config),
    )


def depth_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of layers of an encoder, 0 where there is none, and of a decoder."""
    encoder = int(_first(config, ENCODER_LAYERS, 0)) if config.is_encoder_decoder else 0
    return encoder, int(_first(config, DECODER_LAYERS, 0))


def positions_of(config: PreTrainedConfig) -> int:
    """Return the most tokens that a model reads; LONGEST where its positions have no end."""
    return int(getattr(config, "max_position_embeddings", None) or LONGEST)


def logit_divisor_of(config: PreTrainedConfig) -> float:
    """Return what the product of states and head is divided by, which is 1 in most families."""
    if getattr(config, "scale_decoder_outputs", False):  # T5's, where one table serves words and head
        return float(config.d_model**0.5)
    return float(getattr(config, "logits_scaling", None) or 1.0)


def ties_head(config: PreTrainedConfig) -> bool:
    """Tell whether the word embedding is the head's table too. transformers says so of every T5, and leaves a head of
    its own to those that do not scale what it reads."""
    return bool(config.tie_word_embeddings) and bool(getattr(config, "scale_decoder_outputs", True))


def rope_types(config: PreTrainedConfig) -> set[str]:
    """Return the kinds of rotary angles of a configuration, such as default or yarn."""
    return {str(angles.get("rope_type", "default")) for angles in rotary_angles(config)}


def angles_change_at(config: PreTrainedConfig) -> int | None:
    """Return the length of a pass beyond which all its rotary angles are others, as those of longrope are; None: no
    length changes them."""
    kinds = [angles for angles in rotary_angles(config) if angles.get("rope_type") == "longrope"]
    top = getattr(config, "original_max_position_embeddings", None)
    lengths = [angles.get("original_max_position_embeddings") or top for angles in kinds]
    return min((int(length) for length in lengths if length), default=None)


def rotary_angles(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return what a configuration says of rotary angles, once for each kind of layers that has its own."""
    angles: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [value for value in angles.values() if isinstance(value, dict)] or ([angles] if angles else [])


def _epsilon(config: PreTrainedConfig, blocks: Blocks) -> float:
    return float(getattr(config, blocks.epsilon)) if blocks.epsilon else EPSILON


def _attention_scale(config: PreTrainedConfig, head_size: int) -> float:
    multiplier = getattr(config, "attention_multiplier", None)
    if multiplier is not None:
        return float(multiplier)
    return float((getattr(config, "query_pre_attn_scalar", None) or head_size) ** -0.5)


def _first(config: PreTrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")
