"""A package as ONNX graphs in a folder: model.onnx, or encoder.onnx and decoder.onnx, and the tensors beside them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, DamagedError
from pipeline.models.family import families
from pipeline.runtime.decoder import KeyValueShape
from pipeline.runtime.graph import Graph
from pipeline.runtime.weights import read_weights

HEAD_MULTIPLE = 8
MODEL, ENCODER, DECODER = "model", "encoder", "decoder"


def build(package: Path, folder: Path, activations: int | None = None, sliced: bool = False) -> PreTrainedConfig:
    """Write the graphs of a package into `folder`; return the configuration. `activations` is their width, 8 or 32, by
    default that of the package. With `sliced` a decoder takes `first_logit`. Raises DamagedError for a damaged package,
    ConfigError for an architecture that has no graph."""
    weights, config, spec = read_weights(package)
    check(config)
    graphs, width = graphs_of(config), activations or spec.bits.activations
    try:
        if config.is_encoder_decoder:
            graph = Graph(weights, width)
            graphs.encoder(graph, config)
            graph.save(folder, ENCODER)
        graph = Graph(weights, width)
        graphs.decoder(graph, config, sliced)
        graph.save(folder, DECODER if config.is_encoder_decoder else MODEL)
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{package} lacks what its architecture needs: {error}") from error
    return config


def check(config: PreTrainedConfig) -> None:
    """Raise ConfigError for an architecture that has no graph."""
    graphs_of(config).check(config)
    cache = cache_of(config)
    if cache.head_size % HEAD_MULTIPLE:
        raise ConfigError(
            f"model: ONNX Runtime's attention takes head sizes in multiples of {HEAD_MULTIPLE}, not {cache.head_size}."
        )


def graphs_of(config: PreTrainedConfig) -> Any:
    """Return the module that draws the graphs of a model; a family's siblings may order their layers otherwise."""
    family = families().get(config.model_type)
    if family is None or not family.graph:
        valid = ", ".join(name for name, family in families().items() if family.graph)
        raise ConfigError(
            f"model: a {config.model_type} model has no graph in ONNX Runtime; valid: {valid}. It runs in torch, by "
            "pipeline.load and in transformers, and --format transformers takes it."
        )
    return import_module(f"pipeline.runtime.{family.graph}")


def cache_of(config: PreTrainedConfig) -> KeyValueShape:
    """Return the shape of a model's key-value cache."""
    shape: KeyValueShape = graphs_of(config).cache_of(config)
    return shape


def longest(config: PreTrainedConfig) -> int:
    """Return the most tokens that a text may have."""
    return cache_of(config).longest
