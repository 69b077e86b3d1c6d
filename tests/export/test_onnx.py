"""An ONNX export in ONNX Runtime, against the package it was made from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx as onnx_files
import pytest
from rich.console import Console

from jobs.export import export
from pipeline.config.resources import Resources
from pipeline.export import onnx
from pipeline.package import manifest
from pipeline.package.package import read_package
from pipeline.runtime import Runtime
from tests.packages import WIDE, package, packed_logits, rms

DRAW = np.random.default_rng(1)
IDS, SOURCE = DRAW.integers(3, 300, 24).tolist(), DRAW.integers(3, 300, 31).tolist()


def source_of(family):
    return SOURCE if family == "bart" else None


@pytest.fixture(
    scope="module",
    params=[(family, granularity) for family in WIDE for granularity in ("per_channel", {"per_group": 32})],
    ids=lambda case: f"{case[0]}, {'one scale a row' if case[1] == 'per_channel' else 'in groups'}",
)
def exported(request, tmp_path_factory):
    """family, package, export, notes."""
    family, granularity = request.param
    folder = tmp_path_factory.mktemp(family)
    packed = package(folder / "package", WIDE[family], quantizer="seq", attention="qkv", granularity=granularity)
    return family, packed, folder / "onnx", onnx.write(packed, folder / "onnx")


def test_tensors_read_back_are_scale_times_level_exactly(exported):
    _, packed, folder, _ = exported
    assert onnx.read_back(packed, folder) == (0.0, len(read_package(packed)[0].codes))


def place_of_codes(folder):
    """The file that holds a matrix's codes, and where in it they begin."""
    graph = min(folder.glob("*.onnx"))
    model = onnx_files.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    place = {entry.key: entry.value for entry in codes.external_data}
    return graph.with_name(place["location"]), int(place["offset"])


def test_a_changed_code_is_read_back_as_one(exported, tmp_path):
    _, packed, folder, _ = exported
    changed = shutil.copytree(folder, tmp_path / "onnx")
    data, first = place_of_codes(changed)
    content = bytearray(data.read_bytes())
    content[first : first + 4096] = bytes(byte ^ 3 for byte in content[first : first + 4096])
    data.write_bytes(content)
    assert onnx.read_back(packed, changed)[0] > 0.1


def test_logits_with_fp32_activations_agree(exported):
    family, packed, folder, _ = exported
    found = onnx.open_logits(folder, 1, activations=32)(IDS, source_of(family))
    wanted = Runtime(packed, activations=32).logits(IDS, source_of(family))
    assert np.abs(found - wanted).max() < 1e-5
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]["quant"]
    settings["attention"] = "none"  # operands in fp32
    plain = package(packed.parent / "plain", WIDE[family], **settings)
    assert np.abs(found - packed_logits(plain, IDS, source_of(family), activations=32)).max() < 1e-4


@pytest.mark.parametrize("family", [*WIDE, "llama in groups"])
def test_a_trained_model_is_the_same_in_onnx_runtime(trained, family, tmp_path):
    """Tensors exactly; distributions over 20 texts, with activations in fp32 and as the kernels of 8 bits have them."""
    package = trained(family)
    verdict = export(str(package), "onnx", tmp_path / "out", None, 1, Resources(), Console(quiet=True))
    assert verdict["reasons"] == []
    assert (verdict["prompts"], verdict["steps"]) == (20, 20 * 79)
    assert verdict["exact"]["kl_nats"] < 1e-8
    assert 1e-7 < verdict["as_it_runs"]["kl_nats"] < 1e-4
    found = onnx.open_logits(tmp_path / "out", 1, activations=32)(IDS, source_of(family))
    assert np.abs(found - packed_logits(package, IDS, source_of(family), activations=32)).max() < 1e-3
    assert verdict["read_back_error"] == 0
    assert verdict["tensors_read_back"] == len(read_package(package)[0].codes)


def test_it_runs_as_the_package_does(exported):
    family, packed, folder, _ = exported
    from_package, from_export = Runtime(packed), Runtime(folder)
    wanted = from_package.logits(IDS, source_of(family))
    assert rms(from_export.logits(IDS, source_of(family)) - wanted) < 1e-5
    prompt = source_of(family) or IDS[:6]
    assert list(from_export.generate(prompt, 9)) == list(from_package.generate(prompt, 9))


def test_the_folder_holds_what_a_user_needs_and_no_second_copy_of_a_weight(exported):
    family, packed, folder, notes = exported
    names = {path.name for path in folder.iterdir()}
    graphs = {"encoder.onnx", "decoder.onnx"} if family == "bart" else {"model.onnx"}
    assert names == {"config.json", "generation_config.json", *graphs, *(f"{name}.data" for name in graphs)}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert any("quant.attention: qkv" in note for note in notes)
    written = sum((folder / f"{name}.data").stat().st_size for name in graphs)
    assert written < 2.5 * (packed / manifest.WEIGHTS).stat().st_size
