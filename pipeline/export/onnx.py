"""A packed model as ONNX: model.onnx, or encoder.onnx and decoder.onnx, with the tensors, tokenizer and configuration.

Quantized matrices stay packed, in ONNX Runtime's own operators (MatMulNBits, GatherBlockQuantized), so the files run in
ONNX Runtime and nowhere else. Inputs and outputs are those that `pipeline.runtime.decoder` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline.config.quant import Quant
from pipeline.export.companions import copy_companions
from pipeline.models.blocks import positions_of
from pipeline.package.package import read_package
from pipeline.quant.spec import grid
from pipeline.runtime import Runtime
from pipeline.runtime.build import build, check, longest

__all__ = ["check", "open_in_fp32", "open_logits", "read_back", "write"]


def write(package: Path, out: Path) -> list[str]:
    """Export a package into `out`; return notes. Raises DamagedError, or ConfigError for one without a graph."""
    config = build(package, out)
    copy_companions(package, out)
    fields = json.loads((package / "config.json").read_text(encoding="utf-8"))
    quant = Quant.model_validate(fields.pop("quantization_config")["quant"])
    (out / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    notes = []
    if quant.attention != "none":
        notes.append(f"attention operands stay in fp32, where training had quant.attention: {quant.attention}")
    if longest(config) < positions_of(config):
        notes.append(f"texts of up to {longest(config)} tokens, of the model's {positions_of(config)}")
    return notes


def open_logits(out: Path, threads: int, activations: int | None = None) -> Callable[..., NDArray[np.float32]]:
    """Give ONNX Runtime's logits (length, vocabulary) of one sequence of token ids; a decoder is given also the source.
    With `activations` 32 the kernels multiply in fp32."""
    return Runtime(out, threads, activations).logits


def open_in_fp32(package: Path, out: Path, threads: int) -> Callable[..., NDArray[np.float32]]:
    """Give the logits of the very files under fp32 activations."""
    return open_logits(out, threads, activations=32)


def read_back(package: Path, out: Path) -> tuple[float, int]:
    """Return the largest deviation of a weight of the files from scale times level, relative to it, and the number of
    tensors with codes. Read by the `onnx` package, not by the code that wrote them."""
    frozen, _, _ = read_package(package)
    worst, seen = 0.0, set()
    for modules, codes, scales in _stored(out):
        wanted = np.concatenate([frozen.weight(name).numpy() for name in modules])
        shift = grid(frozen.levels, frozen.bits[modules[0]]).shift
        values = ((codes + shift).astype(np.float32) * scales[..., None]).reshape(len(codes), -1)[:, : wanted.shape[1]]
        worst = max(worst, float((np.abs(values - wanted) / np.maximum(np.abs(wanted), 1e-30)).max()))
        seen.update(modules)
    return (worst if seen == set(frozen.codes) else float("inf")), len(seen)


def _stored(folder: Path) -> Iterator[tuple[list[str], NDArray[np.int64], NDArray[np.float32]]]:
    """Yield modules, codes (rows, blocks, block) and scales (rows, blocks) of every low-bit node."""
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
                continue
            settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            name, bits = node.input[0 if node.op_type == "GatherBlockQuantized" else 1], settings["bits"]
            data, scales = (numpy_helper.to_array(tensors[key]) for key in (name, node.input[2]))
            digits = np.unpackbits(data, axis=-1, bitorder="little").reshape(*data.shape[:2], -1, bits)
            codes = (digits * (1 << np.arange(bits))).sum(-1) - (1 << bits - 1)
            yield name.rpartition(".")[0].split("+"), codes, scales.reshape(data.shape[:2])
