"""Any family as a plain transformers directory: dequantized fp16 weights, for runtimes that read nothing smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import RunError
from pipeline.export.companions import copy_companions
from pipeline.models.build import build, family_of, sites
from pipeline.package import package as artifact
from pipeline.quant.layers import FrozenTensors


def check(config: PreTrainedConfig) -> None:
    """Every family will do."""


def write(package: Path, out: Path) -> list[str]:
    """config.json, model.safetensors in fp16, tokenizer and generation settings; returns no notes.

    Raises:
        RunError: a weight that fp16 cannot hold.
    """
    frozen, config, quantization = artifact.read(package)
    model = plain_model(frozen, config, quantization["family"])
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor.half()).all():
            raise RunError(f"--format transformers: {name} holds values beyond fp16's range; nothing was exported.")
    model.half().save_pretrained(out)
    copy_companions(package, out)
    return []


def plain_model(frozen: FrozenTensors, config: PreTrainedConfig, family: str) -> PreTrainedModel:
    """The model of the architecture's own classes, fp32, with the weights that the codes stand for."""
    model = build(config, seed=0)
    turned = {site.name for site in sites(model, family_of(config, family)) if site.transposed}
    weights: dict[str, Tensor] = {f"{name}.weight": frozen.weight(name) for name in frozen.codes}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in frozen.rest.items()}
    state |= weights
    state = {name: tensor.T if name.removesuffix(".weight") in turned else tensor for name, tensor in state.items()}
    missing, _ = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    if set(missing) - tied:
        raise RunError(f"The package lacks the tensors {sorted(set(missing) - tied)[:3]}.")
    return model.eval()


def open_logits(out: Path, threads: int) -> Callable[..., NDArray[np.float32]]:
    """Logits (length, vocabulary) of plain transformers: fp16 weights, fp32 arithmetic, activations not quantized."""
    return transformers_logits(out)


def transformers_logits(folder: Path, **options: Any) -> Callable[..., NDArray[np.float32]]:
    """Logits of a directory as `from_pretrained` loads it."""
    kind = (
        AutoModelForSeq2SeqLM if PreTrainedConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    )
    model = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
    ).eval()

    @torch.no_grad()
    def logits(ids: list[int], source: list[int] | None = None) -> NDArray[np.float32]:
        given = {"input_ids": torch.tensor([ids])}
        if source is not None:
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
        found: NDArray[np.float32] = model(**given).logits[0].float().numpy()
        return found

    return logits
