"""`bitmill bench sizes`: what the encodings make of GPT-2 small and BART base, with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from pipeline.config.quant import Quant
from pipeline.models.build import build, fp32_bytes, read_config
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student
from pipeline.package.package import write_package
from pipeline.quant.spec import Encoding

MIB = 2**20
BASE = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2 small": {"architecture": "gpt2"},
    "BART base": {
        "architecture": "bart",
        "d_model": 768,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BASE.items()},
    },
}
BITS = ("2-2-8", "4-4-8", "8-8-8")
SHORT = {"scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"}
ENCODINGS: dict[str, tuple[Encoding, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "dense, scales fp16": ("dense", {"scale_dtype": "float16"}),
    "dense, rest fp16": ("dense", {"rest_dtype": "float16", "positions": "fp32"}),
    "dense, positions fp16": ("dense", {"positions": "fp16"}),
    "dense, positions int8": ("dense", {"positions": "int8"}),
    "dense, all short": ("dense", SHORT),
    "base3": ("base3", {}),
    "base3, all short": ("base3", SHORT),
}
NOTHING: dict[str, Any] = {"teacher": {}, "student": {}, "protocol": ""}


def measure(console: Console, models: dict[str, dict[str, Any]] = MODELS) -> dict[str, Any]:
    """Measure and print the table; returns the document of `--json`. Sizes do not depend on the weights' values."""
    rows = []
    table = Table("model", "bits", "encoding", "MiB", "smaller by", "the paper's counting")
    for name, source in models.items():
        for bits in BITS:
            model = build(read_config(source), seed=0)  # fresh, because a student is made in place
            teacher_bytes = fp32_bytes(model)
            make_student(model, _quant(bits, {}).spec(), family_named(source["architecture"]))
            for encoding, (form, _) in ENCODINGS.items():
                if form == "base3" and bits != "2-2-8":
                    continue
                size = packed_size(model, source["architecture"], bits, encoding, teacher_bytes)
                rows.append({"model": name, "bits": bits, "encoding": encoding, **size})
                ratios = (f"{size[ratio]:.1f}x" for ratio in ("ratio", "paper_ratio"))
                table.add_row(name, bits, encoding, f"{size['packed_bytes'] / MIB:.2f}", *ratios)
    console.print(table)
    return {"sizes": rows}


def packed_size(model: PreTrainedModel, family: str, bits: str, encoding: str, teacher_bytes: int) -> dict[str, Any]:
    """Write a student as a package and say how large it is."""
    form, ships = ENCODINGS[encoding]
    quant = _quant(bits, ships)
    frozen = freeze_student(model, quant, family_named(family))
    facts = {"name": family, "teacher_bytes": teacher_bytes, "lineage": {}, "metrics": NOTHING}
    with tempfile.TemporaryDirectory() as folder:
        size: dict[str, Any] = write_package(Path(folder), frozen, model.config, quant, form, family, facts)["size"]
    return size


def _quant(bits: str, ships: dict[str, Any]) -> Quant:
    """Return one scale a row, as in the presets; gamma 1 everywhere, because its search changes scales, not sizes."""
    return Quant(bits=bits, quantizer="lsq_symmetric", granularity="per_channel", gamma_init="one", **ships)
