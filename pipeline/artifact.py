"""The packed model on disk: write, check, load.

config.json, model.safetensors (packed codes, scales, the rest), tokenizer files, a model card, and manifest.json
with the checksum of each. Packing loses nothing: unpacking gives tensors of the same digest that was scored.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from pipeline.config import Quant
from pipeline.errors import DamagedError, RunError
from pipeline.families.models import family_of, read_config, restore_frozen
from pipeline.objects import open_objects
from pipeline.quant.layers import FrozenTensors
from pipeline.quant.packing import pack, packed_columns, unpack
from pipeline.quant.spec import Encoding, grid
from pipeline.records import Size
from pipeline.store import checksum

FORMAT_VERSION = 2
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"


def write(
    folder: Path,
    frozen: FrozenTensors,
    config: PreTrainedConfig,
    quant: Quant,
    encoding: Encoding,
    family: str,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write weights, configs, card and manifest beside the tokenizer files already in `folder`; returns the manifest.

    `facts` holds name, metrics, lineage and teacher_bytes for the manifest and the card.
    """
    save_file(_packed(frozen, encoding), folder / WEIGHTS, metadata={"format": "pt"})
    fields = config.to_diff_dict() | {"model_type": config.model_type, "architectures": config.architectures}
    fields["quantization_config"] = {
        "quant_method": "bitmill",
        "format_version": FORMAT_VERSION,
        "family": family,
        "encoding": encoding,
        "levels": frozen.levels,
        "quant": quant.model_dump(mode="json"),
        "modules": {n: {"bits": frozen.bits[n], "shape": list(c.shape)} for n, c in sorted(frozen.codes.items())},
    }
    _write_json(folder / "config.json", fields)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    size = sizes(frozen, (folder / WEIGHTS).stat().st_size, facts["teacher_bytes"])
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": facts["name"],
        "bits": quant.bits,
        "quantizer": quant.quantizer,
        "digest": frozen.digest(),
        "lineage": facts["lineage"],
        "metrics": facts["metrics"],
        "size": size.model_dump(),
    }
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["files"] = {path.name: checksum(path).model_dump() for path in files}
    _write_json(folder / MANIFEST, manifest)
    return manifest


def sizes(frozen: FrozenTensors, packed_bytes: int, teacher_bytes: int) -> Size:
    """Honest bytes, and the paper's counting: codes at their nominal width, the rest fp32, scales not charged."""
    code_bits = sum(codes.numel() * frozen.bits[name] for name, codes in frozen.codes.items())
    paper_bytes = code_bits // 8 + sum(tensor.numel() * 4 for tensor in frozen.rest.values())
    return Size(
        teacher_bytes=teacher_bytes,
        packed_bytes=packed_bytes,
        ratio=teacher_bytes / packed_bytes,
        paper_bytes=paper_bytes,
        paper_ratio=teacher_bytes / paper_bytes,
    )


def check(folder: Path) -> dict[str, Any]:
    """Every byte against the manifest, which is returned.

    Raises:
        DamagedError: a file is missing, altered or not listed by a plain name.
        RunError: a newer format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files, _ = manifest["format_version"], manifest["files"], manifest["digest"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedError(f"{folder} is not a packed model: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise RunError(
            f"{folder} has format_version {version!r}; this bitmill reads up to {FORMAT_VERSION}. Upgrade bitmill."
        )
    for name, (size, sha256) in listed.items():
        if Path(name).name != name:
            raise DamagedError(f"{folder / MANIFEST} lists the file {name!r}, which is not a plain name.")
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or checksum(path).sha256 != sha256:
            raise DamagedError(f"{path} is missing or does not match the manifest.")
    for name in (WEIGHTS, "config.json"):
        if name not in listed:
            raise DamagedError(f"{folder / MANIFEST} does not list {name}.")
    return manifest


def read(folder: Path) -> tuple[FrozenTensors, PreTrainedConfig, dict[str, Any]]:
    """The frozen tensors, the configuration and its quantization_config, after `check`.

    Raises:
        DamagedError: the tensors are not what the configuration says, or have another digest than the manifest.
    """
    manifest = check(folder)
    config = read_config(folder)
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    config.quantization_config = None
    try:
        frozen = _unpacked(load_file(folder / WEIGHTS), quantization)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder / WEIGHTS} cannot be unpacked: {error}") from error
    if frozen.digest() != manifest["digest"]:
        raise DamagedError(f"{folder / WEIGHTS} unpacks to other tensors than those that were scored.")
    return frozen, config, quantization


def load(source: str | Path) -> PreTrainedModel:
    """A packed model, ready to run, from a directory or a store URI. Every byte is checked.

    Raises:
        DamagedError: a damaged package. RunError: a newer format.
    """
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as scratch:
            return _load(fetch(str(source), Path(scratch)))
    return _load(Path(source))


def fetch(uri: str, folder: Path) -> Path:
    """Copy the files of a package from a store to a folder."""
    objects = open_objects(uri)
    for name in objects.sizes(""):
        (folder / Path(name).name).write_bytes(objects.read(name))
    return folder


def _load(folder: Path) -> PreTrainedModel:
    frozen, config, quantization = read(folder)
    try:
        quant = Quant.model_validate(quantization["quant"])
        return restore_frozen(config, quant.spec(), family_of(config, quantization["family"]), frozen)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder} is damaged: {error}") from error


def _packed(frozen: FrozenTensors, encoding: Encoding) -> dict[str, Tensor]:
    """Packed rows one after the other, flat: no plain loader can take 8-bit codes for the weights they stand for."""
    tensors = {name: tensor.contiguous() for name, tensor in frozen.rest.items()}
    for name, codes in frozen.codes.items():
        bits = frozen.bits[name]
        tensors[f"{name}.weight"] = pack(codes, bits, _encoding_of(bits, encoding), frozen.levels).flatten()
        tensors[f"{name}.weight_scale"] = frozen.scales[name].contiguous()
    return tensors


def _unpacked(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> FrozenTensors:
    levels = quantization.get("levels", "symmetric")  # not in format 1
    grid(levels, 8)  # refuses what is not known
    frozen = FrozenTensors(rest=dict(tensors), levels=levels)
    for name, module in quantization["modules"].items():
        bits, (rows, columns) = int(module["bits"]), module["shape"]
        packed, scale = frozen.rest.pop(f"{name}.weight"), frozen.rest.pop(f"{name}.weight_scale")
        encoding = _encoding_of(bits, quantization["encoding"])
        expected = (rows * packed_columns(columns, bits, encoding),)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise ValueError(f"{name}.weight is {packed.dtype} {tuple(packed.shape)}, not {expected[0]} packed bytes")
        if tuple(scale.shape) not in ((1, 1), (rows, 1)) or not torch.isfinite(scale).all():
            raise ValueError(f"{name}.weight_scale is not one finite scale a matrix or a row")
        frozen.codes[name] = unpack(packed.reshape(rows, -1), columns, bits, encoding, frozen.levels)
        frozen.scales[name], frozen.bits[name] = scale, bits
    return frozen


def _encoding_of(bits: int, encoding: Encoding) -> Encoding:
    return encoding if bits == 2 else "dense"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def model_card(manifest: dict[str, Any]) -> str:
    """The README of a packed model: numbers, lineage, how to load it."""
    size, metrics = manifest["size"], manifest["metrics"]
    rows = "\n".join(
        f"| {name} | {metrics['teacher'].get(name, float('nan')):.4f} | {value:.4f} |"
        for name, value in metrics["student"].items()
    )
    lineage = "\n".join(_lines(manifest["lineage"]))
    return f"""# {manifest["name"]}, {manifest["bits"]} bits

Packed by bitmill with the quantizer `{manifest["quantizer"]}`: {size["packed_bytes"]:,} bytes of weights, every scale
and header counted, {size["ratio"]:.1f} times smaller than the fp32 teacher ({size["teacher_bytes"]:,} bytes).

| test split | teacher | this model |
|---|---|---|
{rows}

Protocol: {metrics["protocol"]}.

    import pipeline
    model = pipeline.load("path/to/this/folder")

The weights are packed codes: a plain `from_pretrained` cannot load them.

Lineage, as step keys:

{lineage}
"""


def _lines(lineage: dict[str, str]) -> Iterable[str]:
    return (f"- {stage}: `{key}`" for stage, key in lineage.items())
