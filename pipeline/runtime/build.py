"""A package as ONNX graphs in a folder: model.onnx, or encoder.onnx and decoder.onnx, and the tensors beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, DamagedError
from pipeline.runtime import bart, gpt2, llama
from pipeline.runtime.decoder import Cache
from pipeline.runtime.graph import Graph
from pipeline.runtime.weights import read_weights

FAMILIES = {"gpt2": gpt2, "llama": llama, "bart": bart}
HEAD_MULTIPLE = 8
MODEL, ENCODER, DECODER = "model", "encoder", "decoder"


def build(package: Path, folder: Path, activations: int | None = None, sliced: bool = False) -> PreTrainedConfig:
    """Write the graphs of a package into `folder`; returns the configuration.

    `activations` is their width, 8 or 32, by default that of the package. With `sliced` a decoder takes `first_logit`.

    Raises:
        DamagedError: a damaged package. ConfigError: an architecture that has no graph.
    """
    weights, config, spec = read_weights(package)
    check(config)
    graphs = family_of(config)
    try:
        width = activations or spec.bits.activations
        if config.is_encoder_decoder:
            graph = Graph(weights, width)
            bart.encoder(graph, config)
            graph.save(folder, ENCODER)
        graph = Graph(weights, width)
        graphs.decoder(graph, config, sliced)
        graph.save(folder, DECODER if config.is_encoder_decoder else MODEL)
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{package} lacks what its architecture needs: {error}") from error
    return config


def check(config: PreTrainedConfig) -> None:
    """Raises ConfigError for an architecture that has no graph."""
    family_of(config).check(config)
    cache = cache_of(config)
    if cache.head_size % HEAD_MULTIPLE:
        raise ConfigError(
            f"model: ONNX Runtime's attention takes head sizes in multiples of {HEAD_MULTIPLE}, not {cache.head_size}."
        )


def family_of(config: PreTrainedConfig) -> Any:
    """The module that draws the graphs of a model; BART's siblings order their layers otherwise."""
    if config.model_type not in FAMILIES:
        valid = ", ".join(FAMILIES)
        raise ConfigError(f"model: a {config.model_type} model has no graph in ONNX Runtime; valid: {valid}")
    return FAMILIES[config.model_type]


def cache_of(config: PreTrainedConfig) -> Cache:
    cache: Cache = family_of(config).cache_of(config)
    return cache


def longest(config: PreTrainedConfig) -> int:
    """Tokens that a text may have."""
    return llama.longest(config) if config.model_type == "llama" else int(config.max_position_embeddings)
