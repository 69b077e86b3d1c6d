"""GPT-2 as an ONNX graph."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.runtime.decoder import Decoder, KeyValueShape
from pipeline.runtime.graph import Graph, check_activation


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of the key-value cache."""
    head_size, longest = config.n_embd // config.n_head, config.max_position_embeddings
    return KeyValueShape(config.n_layer, config.n_head, head_size, longest)


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for an attention scale that is not 1/sqrt(head size), or an unknown activation."""
    check_activation(config.activation_function)
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise ConfigError(
            "model: GPT-2 with another attention scale than 1/sqrt(head size) has no graph for ONNX Runtime."
        )


def decoder(graph: Graph, config: PreTrainedConfig, sliced: bool) -> None:
    """Draw the whole model."""
    inputs, epsilon = Decoder(graph, cache_of(config), sliced), config.layer_norm_epsilon
    words = graph.embed(inputs.ids, "transformer.wte")
    places = graph.embed(inputs.positions, "transformer.wpe")
    x, total = graph.add_and_norm(words, places, "transformer.h.0.ln_1", epsilon)
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        mixed = inputs.attend(graph.linear(x, f"{name}.attn.c_attn"), layer, config.n_head)
        x, total = graph.add_and_norm(graph.linear(mixed, f"{name}.attn.c_proj"), total, f"{name}.ln_2", epsilon)
        inner = graph.activate(graph.linear(x, f"{name}.mlp.c_fc"), config.activation_function)
        following = f"transformer.h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "transformer.ln_f"
        x, total = graph.add_and_norm(graph.linear(inner, f"{name}.mlp.c_proj"), total, following, epsilon)
    head = "transformer.wte" if config.tie_word_embeddings else "lm_head"
    inputs.finish(x, head, config.vocab_size)
