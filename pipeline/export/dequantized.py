"""Any family as a plain transformers directory: dequantized fp16 weights, for runtimes that read nothing smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import RunError, UnfitExportError
from pipeline.export.companions import copy_companions
from pipeline.models.build import build
from pipeline.models.family import family_for
from pipeline.models.student import quant_targets
from pipeline.package.package import read_package
from pipeline.quant.frozen import FrozenTensors


def check(config: PreTrainedConfig) -> None:
    """Refuse nothing: every family will do."""


def write(package: Path, out: Path) -> list[str]:
    """Write config.json, fp16 weights, tokenizer and generation settings. Raises RunError for what fp16 cannot hold."""
    frozen, config, quantization = read_package(package)
    model = plain_model(frozen, config, quantization["family"])
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor.half()).all():
            raise UnfitExportError(
                f"--format transformers: {name} holds values beyond fp16's range; nothing was exported."
            )
    model.half().save_pretrained(out)
    copy_companions(package, out)
    return []


def plain_model(frozen: FrozenTensors, config: PreTrainedConfig, family: str) -> PreTrainedModel:
    """Return the model of the architecture's own classes, fp32, with the weights that the codes stand for."""
    model = build(config, seed=0)
    targets = quant_targets(model, family_for(config.model_type, family))
    turned = {target.name for target in targets if target.transposed}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in frozen.rest.items()}
    state |= {f"{name}.weight": frozen.weight(name) for name in frozen.codes}
    state = {name: tensor.T if name.removesuffix(".weight") in turned else tensor for name, tensor in state.items()}
    missing, _ = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    if set(missing) - tied:
        raise RunError(f"The package lacks the tensors {sorted(set(missing) - tied)[:3]}.")
    return model.eval()


def open_logits(out: Path, threads: int) -> Callable[..., NDArray[np.float32]]:
    """Give logits (length, vocabulary) of a directory as transformers loads it, activations not quantized."""
    seq2seq = PreTrainedConfig.from_pretrained(out).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(
        out, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()

    @torch.no_grad()
    def logits(ids: list[int], source: list[int] | None = None) -> NDArray[np.float32]:
        given = {"input_ids": torch.tensor([ids])}
        if source is not None:
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
        values: NDArray[np.float32] = model(**given).logits[0].float().numpy()
        return values

    return logits
