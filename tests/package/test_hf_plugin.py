"""transformers' own `from_pretrained`, once the format was taught: the same model, which saves itself unchanged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import pipeline
import pipeline.plugin
from pipeline.config.quant import Quant
from pipeline.errors import DamagedError, RunError
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student
from pipeline.package.manifest import REFUSED
from pipeline.package.package import write_package
from pipeline.store.step_store import checksum
from tests.conftest import ARCHITECTURES
from tests.package.test_package import FACTS
from tests.packages import signed

IDS = torch.arange(5, 13)[None]
HOSTILE = {
    "auto_map": {"AutoConfig": "x.Y"},
    "configuration_files": ["config.9.0.0.json"],
    "custom_pipelines": {},
    "num_labels": 7,
}
SHORT = {"scale_dtype": "float16", "rest_dtype": "float16", "positions": "int8"}


def packed(folder, architecture, bits="2-2-8", encoding="base3", tied=True, granularity="per_channel", **ships):
    """A package of random weights; the table of words may be tied to the head or not."""
    quant = Quant(bits=bits, quantizer="lsq_symmetric", granularity=granularity, **ships)
    config = read_config(ARCHITECTURES[architecture], vocab_size=300, tie_word_embeddings=tied)
    model = build(config, seed=0)
    make_student(model, quant.spec(), family_named(architecture))
    folder.mkdir()
    frozen = freeze_student(model, quant, family_named(architecture))
    write_package(folder, frozen, config, quant, encoding, architecture, FACTS)
    return folder


def plain(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForSeq2SeqLM if config["model_type"] == "bart" else AutoModelForCausalLM
    return auto.from_pretrained(folder, **settings)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("architecture", "tied", "bits", "encoding", "ships"),
    [
        ("gpt2", True, "2-2-8", "base3", SHORT),
        ("gpt2", False, "4-8-8", "dense", {}),
        ("gpt2", True, "2-4-8", "base3", {"granularity": {"per_group": 32}}),
        ("llama", True, "8-8-8", "dense", SHORT),
        ("llama", False, "2-2-8", "base3", {}),
        ("bart", True, "2-2-8", "base3", SHORT),
        ("bart", True, "32-8-32", "dense", {"positions": "fp16"}),
    ],
)
def test_both_ways_load_the_same_model_and_save_the_same_bytes(tmp_path, architecture, tied, bits, encoding, ships):
    package = packed(tmp_path / "package", architecture, bits, encoding, tied, **ships)
    guarded, plugged = pipeline.load(package), plain(package)
    assert torch.equal(logits(guarded), logits(plugged))
    written = [model.generate(IDS, max_new_tokens=6, do_sample=False) for model in (guarded, plugged)]
    assert torch.equal(*written)
    for name, model in (("guarded", guarded), ("plugged", plugged)):
        model.save_pretrained(tmp_path / name)
        assert checksum(tmp_path / name / "model.safetensors") == checksum(package / "model.safetensors")
        ours, saved = (json.loads((f / "config.json").read_text()) for f in (package, tmp_path / name))
        assert saved["quantization_config"] == ours["quantization_config"]
        assert torch.equal(logits(plain(tmp_path / name)), logits(guarded))
        assert not list((tmp_path / name).glob("*.py"))


def test_a_saved_copy_may_lie_over_the_package_and_is_still_that_package(tmp_path):
    package = packed(tmp_path / "package", "gpt2")
    model, digest = plain(package), checksum(package / "model.safetensors")
    before = logits(model)
    model.save_pretrained(package)
    assert checksum(package / "model.safetensors") == digest
    assert torch.equal(logits(plain(package)), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto", None])
def test_the_requested_type_does_not_change_what_was_scored(tmp_path, dtype):
    package = packed(tmp_path / "package", "gpt2", **SHORT)
    model = plain(package, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(logits(model), logits(pipeline.load(package)))


def test_it_registers_once_however_often_it_is_imported(tmp_path):
    import importlib

    assert importlib.import_module("pipeline.plugin") is pipeline.plugin
    assert plain(packed(tmp_path / "package", "llama")).hf_quantizer.is_serializable()


def altered(name):
    def change(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] + 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def in_config(**values):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        fields["quantization_config"].update(values)
        (folder / "config.json").write_text(json.dumps(fields))

    return change


def said(**values):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | values))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        altered("transformer.ln_f.weight"),
        altered("transformer.wte.weight_scale"),
        in_config(digest="0" * 64),
        in_config(digest=None),
        in_config(modules={}),
        in_config(family="llama"),
        in_config(levels="full"),
        in_config(quant={"bits": "3-3-8"}),
        in_config(format_version="1"),
        said(n_embd=64),
        said(n_head=0),
        said(layer_norm_epsilon=float("nan")),
    ],
    ids=range(12),
)
def test_the_plugin_refuses_tensors_other_than_those_that_were_scored(tmp_path, damage):
    package = packed(tmp_path / "package", "gpt2", encoding="dense")
    damage(package)
    (package / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"\S"):
        plain(package)


@pytest.mark.parametrize("settings", [{"head_dim": 16}, {"vocab_size": 10}, {"intermediate_size": 64}])
def test_both_ways_refuse_settings_that_the_tensors_do_not_fit(tmp_path, settings):
    package = packed(tmp_path / "package", "llama")
    said(**settings)(package)
    signed(package)
    for load in (pipeline.load, plain):
        with pytest.raises(DamagedError, match="do not fit the architecture"):
            load(package)


def test_both_ways_refuse_a_newer_format(tmp_path):
    package = packed(tmp_path / "package", "gpt2")
    in_config(format_version=2)(package)
    signed(package)
    for load in (pipeline.load, plain):
        with pytest.raises(RunError, match="format_version 2; this bitmill reads up to 1"):
            load(package)


def test_a_module_of_another_architecture_is_refused(tmp_path):
    package = packed(tmp_path / "package", "gpt2")
    fields = json.loads((package / "config.json").read_text())
    llama = json.loads((packed(tmp_path / "llama", "llama") / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(llama | {"quantization_config": fields["quantization_config"]}))
    with pytest.raises(DamagedError, match="the family gpt2 does not know the layer"):
        plain(package)


def test_nothing_in_a_package_is_run(tmp_path):
    """Python files beside the weights, and settings that name them, as a hostile publisher would leave them."""
    package = packed(tmp_path / "package", "gpt2")
    ran = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Model: pass\n"
    for name in ("modeling_x.py", "custom_generate/generate.py", "sitecustomize.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(code)
    config = json.loads((package / "config.json").read_text())
    settings = {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "modeling_x.Model"}}
    (package / "config.json").write_text(json.dumps(config | settings))
    signed(package)
    for load in (pipeline.load, plain):
        with pytest.raises(DamagedError, match="sets 'auto_map', which no package does"):
            load(package)
    assert not ran.exists()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_both_ways_refuse_what_no_package_sets(tmp_path, name):
    """Before transformers builds anything by it: some of these would download and run a kernel."""
    package = packed(tmp_path / "package", "gpt2")
    config = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(config | {name: HOSTILE.get(name, "someone/kernel")}))
    signed(package)
    for load in (pipeline.load, plain):
        with pytest.raises(DamagedError, match=f"sets '{name}', which no package does"):
            load(package)


@pytest.mark.parametrize("name", ["to_dict", "update", "__class__"])
def test_both_ways_refuse_a_setting_in_the_place_of_a_method(tmp_path, name):
    package = packed(tmp_path / "package", "gpt2")
    in_config(**{name: 1})(package)
    signed(package)
    for load in (pipeline.load, plain):
        with pytest.raises(DamagedError, match=f"has a key '{name}', which no package sets"):
            load(package)


def test_a_copy_without_the_manifest_is_for_transformers_only(tmp_path):
    package = packed(tmp_path / "package", "gpt2")
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(DamagedError, match=r"it has no manifest\.json.*import pipeline\.plugin"):
        pipeline.load(tmp_path / "copy")
    assert torch.equal(logits(plain(tmp_path / "copy")), logits(pipeline.load(package)))
