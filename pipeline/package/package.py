"""The packed model on disk: write, check, load.

config.json, model.safetensors (packed codes, scales, the rest), tokenizer files, a model card, and manifest.json
with the checksum of each. Packing loses nothing: unpacking gives tensors of the same digest that was scored.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from pipeline.config.quant import Quant
from pipeline.errors import DamagedError
from pipeline.models.build import read_config
from pipeline.models.family import family_for, family_named
from pipeline.models.student import restore_frozen
from pipeline.package.codec import damage_of, decode, encode, spec_of
from pipeline.package.hf_plugin import keep_packed
from pipeline.package.manifest import CONFIG, FORMAT_VERSION, MANIFEST, REFUSED, WEIGHTS, check, read_settings
from pipeline.package.model_card import model_card
from pipeline.package.pull import from_store, pull
from pipeline.package.safe_read import read_tensors
from pipeline.quant.frozen import FrozenTensors
from pipeline.quant.spec import UNQUANTIZED, Encoding
from pipeline.store.records import Size
from pipeline.store.step_store import checksum


def write_package(
    folder: Path,
    frozen: FrozenTensors,
    config: PreTrainedConfig,
    quant: Quant,
    encoding: Encoding,
    family: str,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write all but tokenizer files; `facts` has name, metrics, lineage, teacher_bytes. Return the manifest."""
    tensors, described = encode(frozen, encoding)
    digest = frozen.digest()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone, and a store is shared
    fields = config.to_diff_dict() | {"model_type": config.model_type, "architectures": config.architectures}
    fields = {name: value for name, value in fields.items() if name not in REFUSED}
    fields["quantization_config"] = {
        "quant_method": "bitmill",
        "format_version": FORMAT_VERSION,
        "family": family,
        "quant": quant.model_dump(mode="json"),
        "digest": digest,
        **described,
    }
    _write_json(folder / CONFIG, fields)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    size = sizes(frozen, (folder / WEIGHTS).stat().st_size, facts["teacher_bytes"], family_named(family).unquantized)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "bits": quant.bits,
        "quantizer": quant.quantizer,
        "digest": digest,
        "size": size.model_dump(),
        **{name: facts[name] for name in ("name", "lineage", "metrics")},
    }
    card = model_card(manifest, fields["quantization_config"], config.is_encoder_decoder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["files"] = {path.name: checksum(path).model_dump() for path in files}
    _write_json(folder / MANIFEST, manifest)
    return manifest


def sizes(frozen: FrozenTensors, packed_bytes: int, teacher_bytes: int, unquantized: Sequence[str] = ()) -> Size:
    """Return honest bytes, and the paper's: codes at nominal width, the rest, `unquantized` too, fp32, no scales."""
    coded = {name: codes for name, codes in frozen.codes.items() if name not in unquantized}
    code_bits = sum(codes.numel() * frozen.bits[name] for name, codes in coded.items())
    rest = sum(tensor.numel() for tensor in frozen.rest.values())
    rest += sum(frozen.codes[name].numel() for name in frozen.codes.keys() - coded.keys())
    return Size.of(teacher_bytes, packed_bytes, code_bits // 8 + 4 * rest)


def read_package(folder: Path) -> tuple[FrozenTensors, PreTrainedConfig, dict[str, Any]]:
    """Return frozen tensors, configuration, quantization_config. Raises as `check`, DamagedError for other tensors."""
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
    """Return a package's configuration and quantization_config. Raises as `read_settings`, and if unreadable."""
    path = folder / CONFIG
    quantization = read_settings(path)["quantization_config"]
    with damage_of(path):
        config = read_config(folder)
    config.quantization_config = None
    return config, quantization


def load(source: str | Path) -> PreTrainedModel:
    """Load a model from a directory or store URI, all checked. Raises DamagedError, or RunError for a newer format."""
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            pull(from_store(str(source)), folder, str(source))
            return _load(folder)
    return _load(Path(source))


def load_in_fp32(folder: Path) -> PreTrainedModel:
    """Load a package with activations and attention operands left as they are: what its weights compute. Raises as
    `load`."""
    return _restored(folder, UNQUANTIZED)[0]


def _load(folder: Path) -> PreTrainedModel:
    model, quantization = _restored(folder)
    return keep_packed(model, read_tensors(folder / WEIGHTS), quantization)


def _restored(folder: Path, activations: int | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and its quantization_config; `activations` is their width, by default that of the package."""
    frozen, config, quantization = read_package(folder)
    with damage_of(folder):
        spec = Quant.model_validate(quantization["quant"]).spec()
        spec = replace(spec, bits=replace(spec.bits, activations=activations or spec.bits.activations))
        return restore_frozen(config, spec, family_for(config.model_type, quantization["family"]), frozen), quantization


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
