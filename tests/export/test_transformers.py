"""Directories that plain transformers loads: dequantized fp16 of any family, and compressed-tensors for Llama."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from jobs.export import export
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.errors import UnfitExportError
from pipeline.export import compressed_tensors, dequantized
from pipeline.export.probes import make_probes
from pipeline.export.verify import measure, reasons_against
from pipeline.models.build import build, read_config, skeleton
from pipeline.models.family import family_named
from pipeline.models.student import make_student
from pipeline.package.package import load, load_in_fp32, read_package, write_package
from pipeline.quant.frozen import freeze
from tests.conftest import ARCHITECTURES
from tests.packages import NO_METRICS, WIDE, package, packed_logits, with_scale

FACTS = {"name": "x", "teacher_bytes": 1000, "lineage": {}, "metrics": NO_METRICS}
PLAIN = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], model(torch.arange(40)[None]).logits.detach().numpy())
assert "pipeline" not in sys.modules
"""


@torch.no_grad()
def exact(package):
    """The packed model's weights with activations untouched, as the format's runtime has them."""
    frozen, config, quantization = read_package(package)
    return dequantized.plain_model(frozen, config, quantization["family"])(torch.arange(40)[None]).logits.numpy()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformers"),
        ("llama", "transformers"),
        ("llama in groups", "transformers"),
        ("llama", "compressed-tensors"),
        ("llama in groups", "compressed-tensors"),
    ],
)
def test_an_export_loads_in_plain_transformers_without_our_code(trained, tmp_path, family, name):
    out = tmp_path / "out"
    verdict = export(str(trained(family)), name, out, None, 1, Resources(), Console(quiet=True))
    assert (verdict["reasons"], verdict["as_it_runs"]) == ([], None)
    assert verdict["exact"]["kl_nats"] < 1e-6
    command = [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), exact(trained(family)), atol=5e-3)


def test_compressed_tensors_hold_whole_numbers_and_say_how_to_serve_them(trained, tmp_path):
    notes = compressed_tensors.write(trained("llama"), tmp_path)
    assert any(
        note.startswith("model.embed_tokens: dequantized, its 300 rows are F16, 153,600 bytes") for note in notes
    )
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert scheme["format"] == "pack-quantized"
    assert scheme["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel",
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        packed = stored.get_slice("model.layers.0.mlp.up_proj.weight_packed")
        assert packed.get_shape() == [256, 256 * 4 // 32]
    assert "vllm serve" in (tmp_path / "README.md").read_text()
    assert compressed_tensors.read_back(trained("llama"), tmp_path)[0] <= 2**-10


@pytest.mark.parametrize(
    ("bits", "quantizer", "widths"), [("8-8-8", "lsq", {8}), ("4-4-8", "seq", {8}), ("2-2-8", "quantgpt", {4})]
)
def test_each_grid_takes_the_width_that_holds_its_levels(trained, tmp_path, bits, quantizer, widths):
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir(), out.mkdir()
    model, quant = (
        build(read_config(ARCHITECTURES["llama"], vocab_size=300), seed=1),
        Quant(bits=bits, quantizer=quantizer),
    )
    make_student(model, quant.spec(), family_named("llama"))
    frozen = freeze(model, quant.spec(), torch.float32, torch.float32)
    write_package(package, frozen, model.config, quant, "dense", "llama", FACTS)
    compressed_tensors.write(package, out)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == widths
    assert compressed_tensors.read_back(package, out)[0] <= 2**-10


def test_what_vllm_has_no_kernel_for_is_told(tmp_path):
    source = {**WIDE["llama"], "intermediate_size": 172, "num_hidden_layers": 1}
    notes = compressed_tensors.write(package(tmp_path / "package", source), tmp_path)
    told = [note for note in notes if "vLLM" in note]
    assert told == ["model.layers.0.mlp.down_proj: 172 inputs, and vLLM's kernels take multiples of 32"]
    assert compressed_tensors.read_back(tmp_path / "package", tmp_path)[0] <= 2**-10


@pytest.mark.parametrize(("size", "of_outputs"), [(32, 8), (64, 32), (128, 8)])
def test_compressed_tensors_hold_a_scale_a_group(tmp_path, size, of_outputs):
    """Of two widths, or with a matrix that is not quantized; a row of 128 is one group of 128."""
    out = tmp_path / "out"
    out.mkdir()
    quant = {"granularity": {"per_group": size}, "quantizer": "lsq", "overrides": {r".*\.o_proj": of_outputs}}
    folder = package(tmp_path / "package", WIDE["llama"], **quant)
    compressed_tensors.write(folder, out)
    told = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    found = {(g["weights"]["num_bits"], g["weights"]["strategy"], g["weights"].get("group_size")) for g in told}
    assert (
        found
        == {
            32: {(4, "group", 32), (8, "group", 32)},
            64: {(4, "group", 64)},
            128: {(4, "group", 128), (8, "group", 128)},
        }[size]
    )
    with safe_open(out / "model.safetensors", "pt") as stored:
        scale = stored.get_slice("model.layers.0.mlp.down_proj.weight_scale")
        assert scale.get_shape() == [128, 256 // size]
    assert compressed_tensors.read_back(folder, out)[0] <= 2**-10
    ids = list(range(20, 60))
    wanted = packed_logits(folder, ids, activations=32)
    assert wanted.std() > 0.3
    assert np.abs(wanted - compressed_tensors.open_logits(out, 1)(ids)).max() < 0.02


@pytest.mark.parametrize(
    ("overrides", "ignored", "widths"),
    [
        ({r".*\.o_proj": 32}, ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"], {4}),
        ({r"model\.layers\.0\..*": 32, r".*1\..*\.v_proj": 8, r".*1.*\.gate_proj": 4}, None, {4, 8}),
    ],
)
def test_each_linear_is_a_target_or_ignored_and_what_vllm_makes_one_of_has_one_scheme(
    tmp_path, overrides, ignored, widths
):
    (out := tmp_path / "out").mkdir()
    folder = package(tmp_path / "package", WIDE["llama"], quantizer="lsq", overrides=overrides)
    compressed_tensors.write(folder, out)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    shape = skeleton(read_config(WIDE["llama"]))
    linears = {name for name, module in shape.named_modules() if isinstance(module, torch.nn.Linear)}
    groups = [(group["weights"]["num_bits"], group["targets"]) for group in told["config_groups"].values()]
    assert {bits for bits, _ in groups} == widths
    rest = linears - {*told["ignore"]}
    scheme = {name: bits for bits, targets in groups for name in (rest if targets == ["Linear"] else targets)}
    assert scheme.keys() == rest
    assert told["ignore"][1:] == (sorted(n for n in linears if ".layers.0." in n) if ignored is None else ignored)
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for layer in {name.rpartition(".")[0] for name in linears if name.endswith(names)}:
            assert len({scheme.get(f"{layer}.{name}") for name in names}) == 1
    assert compressed_tensors.read_back(folder, out)[0] <= 2**-10


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (
            {"overrides": {r".*\.v_proj": 32}},
            "q_proj, .*k_proj, .*v_proj, of which model.layers.0.self_attn.v_proj would",
        ),
        (
            {"quantizer": "seq", "overrides": {r".*\.up_proj": 8}},
            "gate_proj, .*of which model.layers.0.mlp.up_proj would be stored in fp16.*quant.overrides",
        ),
    ],
)
def test_a_matrix_of_vllm_that_is_packed_in_part_is_refused(tmp_path, quant, message):
    folder = package(tmp_path / "package", WIDE["llama"], **quant)
    with pytest.raises(UnfitExportError, match=message):
        compressed_tensors.write(folder, tmp_path)


def test_compressed_tensors_refuse_a_scale_that_fp16_does_not_hold(tmp_path):
    folder = package(tmp_path / "package", WIDE["llama"], granularity={"per_group": 64})
    folder = with_scale(folder, "model.layers.1.mlp.up_proj", 1e-9)
    with pytest.raises(UnfitExportError, match=r"layers\.1\.mlp\.up_proj has scales of fp16.* not hold 1e-09.*: onnx"):
        compressed_tensors.write(folder, tmp_path)


def test_bart_goes_to_plain_transformers_too(tmp_path):
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir(), out.mkdir()
    torch.manual_seed(0)
    model, quant = build(read_config(ARCHITECTURES["bart"], vocab_size=300), seed=1), Quant(bits="4-4-8")
    make_student(model, quant.spec(), family_named("bart"))
    frozen = freeze(model, quant.spec(), torch.float32, torch.float32)
    write_package(package, frozen, model.config, quant, "dense", "bart", FACTS)
    dequantized.write(package, out)
    packed = load(package)
    logits = dequantized.open_logits(out, 1)
    measured = measure(load_in_fp32(package), packed, logits, None, make_probes(packed, None))
    assert measured.prompts == 20
    assert measured.exact.kl_nats < 1e-6
    assert reasons_against(measured, None) == ()
