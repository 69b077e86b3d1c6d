"""A packed model as ONNX: model.onnx, or encoder.onnx and decoder.onnx, with the tensors, tokenizer and configuration.

Quantized matrices stay packed, in ONNX Runtime's own operators (MatMulNBits, GatherBlockQuantized), so the files run in
ONNX Runtime and nowhere else. Inputs and outputs are those that `pipeline.runtime.decoder` names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import artifact
from pipeline.config import Quant
from pipeline.runtime import Runtime
from pipeline.runtime.build import build, longest

OURS = {artifact.WEIGHTS, artifact.MANIFEST, "README.md", "config.json"}  # the rest of a package goes along


def write(package: Path, out: Path) -> list[str]:
    """Export a package into `out`; returns what a user should know.

    Raises:
        DamagedError: a damaged package. ConfigError: an architecture without a graph.
    """
    config = build(package, out)
    for name in artifact.check(package)["files"]:
        if name not in OURS:
            shutil.copyfile(package / name, out / name)
    fields = json.loads((package / "config.json").read_text(encoding="utf-8"))
    quant = Quant.model_validate(fields.pop("quantization_config")["quant"])
    (out / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    notes = []
    if quant.attention != "none":
        notes.append(f"attention operands stay in fp32, where training had quant.attention: {quant.attention}")
    if longest(config) < config.max_position_embeddings:
        notes.append(f"texts of up to {longest(config)} tokens, of the model's {config.max_position_embeddings}")
    return notes


def open_logits(out: Path, threads: int, activations: int | None = None) -> Callable[..., NDArray[np.float32]]:
    """ONNX Runtime's logits (length, vocabulary) of one sequence of token ids; of a decoder, given also the source.

    With `activations` 32 the kernels multiply in fp32, which shows whether the weights are the packed model's.
    """
    return Runtime(out, threads, activations).logits
