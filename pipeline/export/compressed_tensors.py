"""Llama in compressed-tensors' `pack-quantized` layout, which vLLM serves and plain transformers loads.

Linears hold their levels as whole numbers of 4 or 8 bits, the widths that vLLM's kernels have had from the start; 2-bit
levels take 4. The word embedding and an untied head are dequantized to fp16: vLLM reads no other. Activations are not
quantized there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.export.companions import copy_companions
from pipeline.export.dequantized import transformers_logits
from pipeline.package import manifest
from pipeline.package import package as artifact
from pipeline.quant.layers import FrozenTensors
from pipeline.quant.spec import grid


def check(config: PreTrainedConfig) -> None:
    """Raises ConfigError for other families than Llama."""
    if config.model_type != "llama":
        raise ConfigError(
            f"--format compressed-tensors takes llama models, not {config.model_type}, whose layers vLLM does not read "
            "in this layout. Valid for it: onnx, transformers" + (", gguf." if config.model_type == "gpt2" else ".")
        )


def write(package: Path, out: Path) -> list[str]:
    """config.json, model.safetensors, tokenizer; returns what is not held as codes, with its bytes."""
    frozen, config, _ = artifact.read(package)
    check(config)
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    notes = []
    for name in frozen.codes:
        bits = _stored_bits(frozen, name)
        if name.startswith("model.layers.") and bits is not None:
            tensors |= _packed(frozen, name, bits)
            widths[name] = bits
            continue
        weight = tensors[f"{name}.weight"] = frozen.weight(name).half()
        notes.append(f"{name}: dequantized, its {weight.shape[0]} rows are F16, {weight.nbytes:,} bytes")
    tensors |= {name: tensor.half().contiguous() for name, tensor in frozen.rest.items()}
    save_file(tensors, out / manifest.WEIGHTS, metadata={"format": "pt"})
    config.dtype = torch.float16
    config.quantization_config = _scheme(widths)
    config.save_pretrained(out)
    copy_companions(package, out)
    (out / "README.md").write_text(_card(out), encoding="utf-8")
    return notes


def serve_command(out: Path) -> str:
    """What serves the directory."""
    return f"vllm serve {out} --dtype float16"


def _stored_bits(frozen: FrozenTensors, name: str) -> int | None:
    """The width that holds the whole numbers of a module's levels, or None."""
    kind = grid(frozen.levels, frozen.bits[name])
    low, high = (2 * kind.low + 1, 2 * kind.high + 1) if kind.shift else (kind.low, kind.high)
    return next((bits for bits in (4, 8) if low >= -(2 ** (bits - 1)) and high < 2 ** (bits - 1)), None)


def _packed(frozen: FrozenTensors, name: str, bits: int) -> dict[str, Tensor]:
    codes, scale = frozen.codes[name], frozen.scales[name].float().expand(len(frozen.codes[name]), 1)
    if grid(frozen.levels, frozen.bits[name]).shift:  # halves are whole numbers of half a step
        codes, scale = 2 * codes + 1, scale / 2
    return {
        f"{name}.weight_packed": pack_to_int32(codes.to(torch.int8), bits).contiguous(),
        f"{name}.weight_scale": scale.half().contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _scheme(widths: dict[str, int]) -> dict[str, Any]:
    """One group a width; the layers of each are named where they differ."""
    groups: dict[int, list[str]] = {}
    for name, bits in sorted(widths.items()):
        groups.setdefault(bits, []).append(name)
    weights = {"type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{bits}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {"num_bits": bits, **weights},
                "format": "pack-quantized",
            }
            for bits, names in groups.items()
        },
    }


def _card(out: Path) -> str:
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    widths = ", ".join(str(group["weights"]["num_bits"]) for group in scheme.values())
    return f"""# A packed model in compressed-tensors

Linears hold the levels of the packed model as whole numbers of {widths} bits with one scale a row; the word embedding
is fp16. Activations are not quantized.

    vllm serve path/to/this/folder --dtype float16

    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("path/to/this/folder")   # needs the package compressed-tensors
"""


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """The largest relative deviation of a linear that transformers loaded, and how many were compared."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    frozen, _, _ = artifact.read(package)
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, local_files_only=True, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    worst = 0.0
    for name in frozen.codes:
        wanted = frozen.weight(name)
        worst = max(worst, float(((loaded[f"{name}.weight"] - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()))
    return worst, len(frozen.codes)


def open_logits(out: Path, threads: int) -> Callable[..., NDArray[np.float32]]:
    """Logits (length, vocabulary) of transformers with compressed-tensors, as a plain `from_pretrained` loads it."""
    return transformers_logits(out)
