"""Importing this module teaches transformers the packed format: `from_pretrained` then loads a package's folder.

Weights are dequantized once, at load, into the modules that training ran; the packed tensors are kept beside them, a
tenth of the size, so that `save_pretrained` writes the very same file again. A model that was changed meanwhile is not
what would be saved, so it is not trainable in transformers' sense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from pipeline.config.quant import Quant
from pipeline.errors import ConfigError, DamagedError
from pipeline.models.family import family_for
from pipeline.models.student import thaw_into
from pipeline.package.codec import decode, spec_of
from pipeline.package.manifest import CONFIG, read_settings
from pipeline.package.safe_read import read_tensors
from pipeline.quant.frozen import FrozenTensors

METHOD = "bitmill"


@register_quantization_config(METHOD)
class BitmillConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization_config of a package. Raises DamagedError for a key that would stand in the place of a method."""

    def __init__(self, **fields: Any) -> None:
        shadowing = [name for name in fields if hasattr(type(self), name)]
        if shadowing:
            raise DamagedError(f"quantization_config in {CONFIG} has a key {shadowing[0]!r}, which no package sets.")
        self.__dict__.update(fields)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class BitmillQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reads the packed tensors itself, and lets transformers load them into placeholders that are then replaced."""

    def __init__(self, quantization_config: BitmillConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.tensors: dict[str, Tensor] = {}
        self.frozen = FrozenTensors()

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # what scales and activation ranges are computed in; types on disk are the package's own

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuse what no package sets, as `pipeline.load` does: this is called before the model is built."""
        commit = getattr(config, "_commit_hash", None)
        path = cached_file(config.name_or_path, CONFIG, revision=commit, local_files_only=True)
        if path is None:
            raise DamagedError(f"{config.name_or_path} has no {CONFIG}.")
        read_settings(Path(path))
        return config

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return dict(self.tensors), {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        fields = self.quantization_config.to_dict()
        with torch.device("cpu"):  # transformers builds the model around us on the meta device
            self.tensors, self.frozen = _verified(checkpoint_files, fields)
        config = copy.deepcopy(model.config)
        config.quantization_config = None
        spec_of(config, fields, self.frozen.shapes, Path(model.name_or_path))  # before they stand in its place
        for name in self.frozen.codes:
            module = model.get_submodule(name)
            packed, scale = self.tensors[f"{name}.weight"], self.tensors[f"{name}.weight_scale"]
            module.weight = nn.Parameter(torch.empty_like(packed, device="meta"), requires_grad=False)
            module.register_buffer("weight_scale", torch.empty_like(scale, device="meta"))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, codes in self.frozen.codes.items():
            module: Any = model.get_submodule(name)
            del module.weight_scale
            shape = codes.T.shape if hasattr(module, "nf") else codes.shape  # GPT-2's Conv1D keeps (in, out)
            module.weight = nn.Parameter(torch.empty(shape))
        fields = self.quantization_config.to_dict()
        try:
            quant = Quant.model_validate(fields["quant"])
            thaw_into(model, quant.spec(), family_for(model.config.model_type, fields["family"]), self.frozen)
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise DamagedError(f"The package {model.name_or_path} is damaged: {error}") from error
        self.frozen = FrozenTensors()
        return model.eval()


def keep_packed(model: PreTrainedModel, tensors: Mapping[str, Tensor], quantization: dict[str, Any]) -> PreTrainedModel:
    """Let a thawed model save itself as the package it came from."""
    quantizer = BitmillQuantizer(BitmillConfig(**quantization))
    quantizer.tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # off the file, as in `_verified`
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    return model


def _verified(files: list[str] | None, quantization: dict[str, Any]) -> tuple[dict[str, Tensor], FrozenTensors]:
    if not files or len(files) != 1:
        raise DamagedError(f"A packed model has one file of weights, and these were found: {files}.")
    path = Path(files[0])
    read_settings(path.with_name(CONFIG))  # of a subfolder, it was not looked at before
    try:
        tensors = read_tensors(path)
        frozen = decode(tensors, quantization)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be unpacked: {error!r}") from error
    if frozen.digest() != quantization.get("digest"):
        raise DamagedError(f"{path} unpacks to other tensors than those that were scored.")
    # Off the file, which may be overwritten while the model lives.
    return {name: tensor.clone() for name, tensor in tensors.items()}, frozen
