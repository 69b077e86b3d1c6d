"""The packed model on disk: write, check, load.

config.json, model.safetensors (packed codes, scales, the rest), tokenizer files, a model card, and manifest.json
with the checksum of each. Packing loses nothing: unpacking gives tensors of the same digest that was scored.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from pipeline.config.quant import Quant
from pipeline.errors import DamagedError
from pipeline.models.build import FAMILIES, family_of, read_config, restore_frozen
from pipeline.package.codec import damage_of, decode, encode, spec_of
from pipeline.package.hf_plugin import keep_packed
from pipeline.package.manifest import CONFIG, FORMAT_VERSION, MANIFEST, REFUSED, WEIGHTS, check, read_settings
from pipeline.package.model_card import model_card
from pipeline.package.pull import from_store, pull
from pipeline.package.safe_read import read_tensors
from pipeline.quant.layers import FrozenTensors
from pipeline.quant.spec import Encoding
from pipeline.store.records import Size
from pipeline.store.step_store import checksum


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
    tensors, described = encode(frozen, encoding)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone, and a store is shared
    fields = config.to_diff_dict() | {"model_type": config.model_type, "architectures": config.architectures}
    fields = {name: value for name, value in fields.items() if name not in REFUSED}
    fields["quantization_config"] = {
        "quant_method": "bitmill",
        "format_version": FORMAT_VERSION,
        "family": family,
        "quant": quant.model_dump(mode="json"),
        "digest": frozen.digest(),
        **described,
    }
    _write_json(folder / CONFIG, fields)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    size = sizes(frozen, (folder / WEIGHTS).stat().st_size, facts["teacher_bytes"], FAMILIES[family].unquantized)
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
    card = model_card(manifest, fields["quantization_config"], config.is_encoder_decoder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["files"] = {path.name: checksum(path).model_dump() for path in files}
    _write_json(folder / MANIFEST, manifest)
    return manifest


def sizes(frozen: FrozenTensors, packed_bytes: int, teacher_bytes: int, unquantized: Sequence[str] = ()) -> Size:
    """Honest bytes, and the paper's counting: codes at their nominal width, the rest fp32, scales not charged.

    The paper has position embeddings among the rest: `unquantized` names them, however they ship.
    """
    rest = sum(tensor.numel() for tensor in frozen.rest.values())
    rest += sum(codes.numel() for name, codes in frozen.codes.items() if name in unquantized)
    code_bits = sum(
        codes.numel() * frozen.bits[name] for name, codes in frozen.codes.items() if name not in unquantized
    )
    paper_bytes = code_bits // 8 + 4 * rest
    return Size(
        teacher_bytes=teacher_bytes,
        packed_bytes=packed_bytes,
        ratio=teacher_bytes / packed_bytes,
        paper_bytes=paper_bytes,
        paper_ratio=teacher_bytes / paper_bytes,
    )


def read(folder: Path) -> tuple[FrozenTensors, PreTrainedConfig, dict[str, Any]]:
    """The frozen tensors, the configuration and its quantization_config, after `check`.

    Raises:
        DamagedError: the tensors are not what the configuration says, or have another digest than the manifest.
        RunError: a newer format.
    """
    manifest = check(folder)
    config, quantization = configuration(folder)
    try:
        frozen = decode(read_tensors(folder / WEIGHTS), quantization)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / WEIGHTS} cannot be unpacked: {error}") from error
    spec_of(config, quantization, frozen.shapes, folder)
    if frozen.digest() != manifest["digest"]:
        raise DamagedError(f"{folder / WEIGHTS} unpacks to other tensors than those that were scored.")
    return frozen, config, quantization


def configuration(folder: Path) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of a package and its quantization_config.

    Raises:
        DamagedError: transformers cannot read it, or it is not one of a package, as `read_settings` says.
    """
    path = folder / CONFIG
    quantization = read_settings(path)["quantization_config"]
    with damage_of(path):
        config = read_config(folder)
    config.quantization_config = None
    return config, quantization


def load(source: str | Path) -> PreTrainedModel:
    """A packed model, ready to run, from a directory or a store URI. Every byte is checked.

    Raises:
        DamagedError: a damaged package. RunError: a newer format.
    """
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            pull(from_store(str(source)), folder, str(source))
            return _load(folder)
    return _load(Path(source))


def _load(folder: Path) -> PreTrainedModel:
    frozen, config, quantization = read(folder)
    with damage_of(folder):
        quant = Quant.model_validate(quantization["quant"])
        model = restore_frozen(config, quant.spec(), family_of(config, quantization["family"]), frozen)
    return keep_packed(model, read_tensors(folder / WEIGHTS), quantization)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
