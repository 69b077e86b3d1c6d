"""Packages with random weights, and what the packed model says about a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.quant import Quant
from pipeline.models.build import build, fp32_bytes, read_config
from pipeline.models.family import family_named
from pipeline.models.student import make_student
from pipeline.package.package import load, read_package, write_package
from pipeline.quant.frozen import freeze
from pipeline.quant.modules import InputQuantizer
from pipeline.store.step_store import checksum

NO_METRICS = {"teacher": {}, "student": {}, "protocol": "none", "validation": {"teacher": {}, "student": {}}}
WIDE = {  # head sizes that kernels take, widths that are whole blocks
    "gpt2": {"architecture": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": 300},
    "llama": {
        "architecture": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 300,
        "pad_token_id": None,
    },
    "bart": {
        "architecture": "bart",
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "max_position_embeddings": 128,
        "vocab_size": 300,
        "decoder_start_token_id": 2,
    },
}


def package(folder: Path, source: dict[str, Any], encoding: str = "dense", **quant: Any) -> Path:
    """A package of a model whose weights, norms and biases are all random."""
    folder.mkdir(parents=True)
    config = read_config(source)
    model = build(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and float(parameter.mean()) > 0.5 else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.1 + centre)
    settings = Quant.model_validate({"bits": "2-2-8", "granularity": "per_channel", **quant})
    family, size = family_named(config.model_type), fp32_bytes(model)
    make_student(model, settings.spec(), family)
    frozen = freeze(model, settings.spec(), torch.float32, torch.float32)
    facts = {"name": "random", "teacher_bytes": size, "lineage": {}}
    facts["metrics"] = NO_METRICS
    write_package(folder, frozen, config, settings, encoding, family.name, facts)
    return folder


def with_scale(folder: Path, module: str, value: float) -> Path:
    """The package with one scale changed, beside it."""
    frozen, config, quantization = read_package(folder)
    frozen.scales[module][3, 1] = value
    changed = folder.with_name("changed")
    changed.mkdir()
    facts = {"name": "random", "teacher_bytes": 1000, "lineage": {}}
    facts["metrics"] = NO_METRICS
    quant = Quant.model_validate(quantization["quant"])
    write_package(changed, frozen, config, quant, "dense", quantization["family"], facts)
    return changed


def packed_logits(folder: Path, ids: list[int], source: list[int] | None = None, activations: int | None = None):
    """(length, vocabulary) by torch, with activations as in training or of another width."""
    model = load(folder)
    for module in model.modules():
        if isinstance(module, InputQuantizer) and activations is not None:
            module.bits = activations
    given = {"input_ids": torch.tensor([ids])}
    if source is not None:
        given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
    with torch.inference_mode():
        return model(**given).logits[0].numpy()


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


def signed(folder: Path) -> None:
    """Make the manifest agree with whatever lies in the folder, as a careful attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"]
    manifest["files"] = {path.name: checksum(path).model_dump() for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
