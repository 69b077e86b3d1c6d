"""`bitmill bench sizes`: what the encodings make of GPT-2 small and BART base, from their shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from jobs.display import print_table
from pipeline.config.presets import PRESETS
from pipeline.config.quant import Quant
from pipeline.models.build import fp32_bytes, read_config, skeleton
from pipeline.models.family import family_named
from pipeline.package.size import layout
from pipeline.quant.granularity import GROUP_SIZES
from pipeline.quant.spec import Encoding
from pipeline.store.records import Size

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
A_ROW: dict[str, Any] = {"granularity": "per_channel"}  # as in the presets best and smallest
SHORT = {name: PRESETS["smallest"]["quant"][name] for name in ("scale_dtype", "rest_dtype", "positions")}
ENCODINGS: dict[str, tuple[Encoding, dict[str, Any]]] = {
    "dense, a scale a matrix": ("dense", {"granularity": "per_tensor"}),
    **{f"dense, groups of {size}": ("dense", {"granularity": {"per_group": size}}) for size in GROUP_SIZES},
    "dense, groups of 64, scales fp16": ("dense", {"granularity": {"per_group": 64}, "scale_dtype": "float16"}),
    "dense": ("dense", A_ROW),
    "dense, scales fp16": ("dense", {**A_ROW, "scale_dtype": "float16"}),
    "dense, rest fp16": ("dense", {**A_ROW, "rest_dtype": "float16", "positions": "fp32"}),
    "dense, positions fp16": ("dense", {**A_ROW, "positions": "fp16"}),
    "dense, positions int8": ("dense", {**A_ROW, "positions": "int8"}),
    "dense, all short": ("dense", {**A_ROW, **SHORT}),
    "base3": ("base3", A_ROW),
    "base3, all short": ("base3", {**A_ROW, **SHORT}),
}
HEADER = ("model", "bits", "encoding", "MiB", "smaller by", "the paper's counting")
ZEROS = "final_logits_bias"  # a buffer of BART's that nothing trains, and that is not stored while it is zero


def measure(console: Console, models: dict[str, dict[str, Any]] = MODELS) -> dict[str, Any]:
    """Print the table of `MODELS`; returns the document of `--json`."""
    sizes = [
        {"model": name, "bits": bits, "encoding": encoding, **packed_size(source, bits, encoding).model_dump()}
        for name, source in models.items()
        for bits in BITS
        for encoding, (form, _) in ENCODINGS.items()
        if form == "dense" or bits == "2-2-8"
    ]
    print_table(console, HEADER, map(cells, sizes))
    return {"sizes": sizes}


def packed_size(source: dict[str, Any], bits: str, encoding: str) -> Size:
    """Return the size of a model's package in an encoding."""
    form, fields = ENCODINGS[encoding]
    family, quant = family_named(source["architecture"]), Quant.model_validate({"bits": bits, **fields})
    teacher_bytes = fp32_bytes(skeleton(read_config(source)))
    shape = layout(skeleton(read_config(source)), family, quant, form)
    widths = {name: quant.spec().weight_bits(name, role) for name, role in shape.roles.items()}
    stored = replace(shape, rest={name: tensor for name, tensor in shape.rest.items() if name != ZEROS})
    return Size.of(teacher_bytes, stored.packed_bytes(widths), shape.paper_bytes(widths))


def cells(size: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of `HEADER`."""
    ratios = (f"{size[ratio]:.1f}x" for ratio in ("ratio", "paper_ratio"))
    return size["model"], size["bits"], size["encoding"], f"{size['packed_bytes'] / MIB:.1f}", *ratios
