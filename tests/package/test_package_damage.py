"""A package that is damaged, truncated, hostile or of a newer format gets a clear error, never a wrong model."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline
from pipeline.errors import BitmillError, DamagedError, RunError
from pipeline.package.codec import damage_of
from pipeline.store.step_store import checksum
from tests.packages import signed


@pytest.fixture
def package(finished, tmp_path):
    return shutil.copytree(finished.package, tmp_path / "package")


def edited(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def cut(package):
    (package / "model.safetensors").write_bytes((package / "model.safetensors").read_bytes()[:-64])


def flipped(package):
    data = bytearray((package / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (package / "model.safetensors").write_bytes(data)


def longer(package):
    with open(package / "model.safetensors", "ab") as file:
        file.write(b"\0" * 8)


def listed(name):
    def change(package):
        entry = checksum(package / "README.md").model_dump()
        edited(package / "manifest.json", lambda fields: fields["files"].update({name: entry}))

    change.__name__ = f"listed {name}"
    return change


def without(*names):
    def change(package):
        for name in names:
            (package / name).unlink()

    change.__name__ = f"without {names}"
    return change


def manifest(text):
    def change(package):
        (package / "manifest.json").write_text(text)

    change.__name__ = f"manifest {text}"
    return change


def left(name):
    def change(package):
        (package / name).symlink_to("/etc/hostname")

    return change


def digest(value):
    def change(package):
        edited(package / "manifest.json", lambda fields: fields.update(digest=value))

    return change


def unlisted(package):
    edited(package / "manifest.json", lambda fields: fields["files"].pop("model.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors is missing or does not match"),
        (flipped, "model.safetensors is missing or does not match"),
        (longer, "model.safetensors is missing or does not match"),
        (without("model.safetensors"), "model.safetensors is missing or does not match"),
        (without("tokenizer.json"), "tokenizer.json is missing or does not match"),
        (without("manifest.json"), "is not a packed model: it has no manifest.json"),
        (unlisted, "does not list model.safetensors"),
        (listed("../README.md"), "'../README.md', which is not a plain name"),
        (listed("/etc/passwd"), "'/etc/passwd', which is not a plain name"),
        (listed("a/b"), "'a/b', which is not a plain name"),
        (listed(".."), r"\.\."),
        (left("modeling.py"), "modeling.py is not listed"),
        (digest("../elsewhere"), "which is no SHA-256"),
        (digest("0" * 64), "has another digest than config.json"),
        (manifest(""), "manifest.json is damaged"),
        (manifest("[]"), "manifest.json is damaged"),
        (manifest('{"format_version": 1, "files": {"model.safetensors": 3}}'), "manifest.json is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_package_is_refused(package, damage, message):
    damage(package)
    with pytest.raises(DamagedError, match=message):
        pipeline.load(package)


def test_a_newer_format_is_refused_with_advice(package):
    edited(package / "manifest.json", lambda fields: fields.update(format_version=2))
    with pytest.raises(RunError, match=r"format_version 2; this bitmill reads up to 1\. Upgrade bitmill"):
        pipeline.load(package)


@pytest.mark.parametrize("lacking", ["levels", "zeros", "digest"])
def test_a_package_that_does_not_say_what_every_package_says_is_refused(package, lacking):
    edited(package / "config.json", lambda fields: fields["quantization_config"].pop(lacking))
    signed(package)
    with pytest.raises(DamagedError, match=lacking):
        pipeline.load(package)


@pytest.mark.parametrize("levels", ["quinary", "full", "midpoint", "", ["symmetric"], None, 3])
def test_levels_that_are_not_known_or_not_those_of_the_codes_are_damage(package, levels):
    edited(package / "config.json", lambda fields: fields["quantization_config"].update(levels=levels))
    signed(package)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        pipeline.load(package)


def test_unknown_levels_are_damage_even_where_nothing_is_packed(package):
    def change(fields):
        fields["quantization_config"].update(levels=3, modules={})

    edited(package / "config.json", change)
    signed(package)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        pipeline.load(package)


@pytest.mark.parametrize("what", ["scale", "nan scale", "code", "rest", "impossible code", "renamed", "not tensors"])
def test_altered_tensors_are_refused_even_with_matching_checksums(package, what):
    path, name = package / "model.safetensors", "transformer.h.0.attn.c_attn"
    tensors = load_file(path)
    if what == "scale":
        tensors[f"{name}.weight_scale"] *= 2
    elif what == "nan scale":
        tensors[f"{name}.weight_scale"] *= math.nan
    elif what == "code":
        tensors[f"{name}.weight"].view(-1)[0] ^= 0b01  # another of the three levels, or none
    elif what == "rest":
        tensors["transformer.ln_f.weight"][3] += 1
    elif what == "impossible code":
        tensors[f"{name}.weight"].view(-1)[0] = 0
    elif what == "renamed":
        tensors["other.weight"] = tensors.pop(f"{name}.weight")
    if what == "not tensors":
        path.write_bytes(b"\xff" * 64)
    else:
        save_file(tensors, path)
    signed(package)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        pipeline.load(package)


def module(fields):
    return fields["quantization_config"]["modules"]["transformer.wte"]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("quantization_config"),
        lambda fields: fields["quantization_config"].pop("modules"),
        lambda fields: fields["quantization_config"].pop("family"),
        lambda fields: fields["quantization_config"].pop("quant"),
        lambda fields: fields["quantization_config"]["quant"].update(bits="3-3-8"),
        lambda fields: fields["quantization_config"].update(family="bert"),
        lambda fields: module(fields).update(bits=64),
        lambda fields: module(fields).update(shape=[300]),
        lambda fields: fields.update(n_embd=64),
        lambda fields: fields.update(n_layer=1),
        lambda fields: fields.update(vocab_size=10**13),
        lambda fields: fields.update(model_type="nonsense"),
    ],
    ids=range(12),
)
def test_a_hostile_configuration_is_refused_clearly(package, change):
    edited(package / "config.json", change)
    signed(package)
    with pytest.raises(BitmillError, match=r"\S"):
        pipeline.load(package)


def twice(name, key):
    """A JSON key said twice, so that two readers could take it for different values."""

    def change(package):
        path = package / name
        text = path.read_text().replace(f'"{key}":', f'"{key}": 7, "{key}":', 1)
        path.write_text(text)

    return change


def header(change):
    """Rewrite the header of the weights file; the tensors' bytes stay."""

    def rewrite(package):
        path = package / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length])
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return rewrite


def claims_a_huge_header(package):
    path = package / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def scaled(factor):
    def change(package):
        path = package / "model.safetensors"
        tensors = load_file(path)
        tensors["transformer.wte.weight_scale"][1] *= factor
        save_file(tensors, path)

    return change


def in_groups_that_do_not_divide(package):
    path = package / "model.safetensors"
    tensors = load_file(path)
    scale = tensors["transformer.wte.weight_scale"]
    tensors["transformer.wte.weight_scale"] = scale.repeat(1, 5)
    save_file(tensors, path)


def said(**fields):
    return lambda package: edited(package / "config.json", lambda config: config.update(fields))


def quantization(**fields):
    return lambda package: edited(package / "config.json", lambda c: c["quantization_config"].update(fields))


ABSURD = {"dtype": "float32", "shape": [10**6, 10**6]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (twice("config.json", "n_layer"), "the key 'n_layer' appears twice"),
        (header(lambda text: text.replace(b'{"', b'{"transformer.wte.weight":{},"', 1)), "appears twice"),
        (header(lambda text: text + b" " * 17 * 2**20), "a header of"),
        (header(lambda text: b"[" * 100_000), "nested too deep"),
        (header(lambda text: text.replace(b'"shape":[', b'"shape":[99999999999,', 1)), "not tensors"),
        (claims_a_huge_header, "a header of 4611686018427387904 bytes"),
        (scaled(math.inf), "scales that are not finite, or below zero"),
        (scaled(math.nan), "scales that are not finite, or below zero"),
        (scaled(-1.0), "scales that are not finite, or below zero"),
        (in_groups_that_do_not_divide, "is not one a matrix, a row or a group"),
        (quantization(zeros={"final_logits_bias": ABSURD}), "longer than the vocabulary"),
        (quantization(zeros={"transformer.ln_f.weight": ABSURD}), "not a tensor that may be left out"),
        (said(num_labels=10**10), "sets 'num_labels'"),
        (said(auto_map={"AutoConfig": "x.Y"}), "sets 'auto_map'"),
        (said(attn_implementation="someone/kernel"), "sets 'attn_implementation'"),
        (said(transformers_weights="../other.safetensors"), "sets 'transformers_weights'"),
        (said(dtype="float30"), r"config\.json is damaged"),
        (said(n_layer=10**12), "no model has more than 1000"),
        (said(text_config={"num_local_experts": 10**9}), "no model has more than 1000"),
        (said(n_layer=900), "there are fewer tensors"),
    ],
    ids=range(20),
)
def test_what_hostile_files_try_is_named_even_with_matching_checksums(package, damage, message):
    damage(package)
    signed(package)
    with pytest.raises(DamagedError, match=message):
        pipeline.load(package)


def test_a_manifest_that_says_a_thing_twice_is_refused(package):
    twice("manifest.json", "digest")(package)
    with pytest.raises(DamagedError, match="the key 'digest' appears twice"):
        pipeline.load(package)


def test_a_manifest_without_a_digest_is_refused(package):
    edited(package / "manifest.json", lambda fields: fields.pop("digest"))
    with pytest.raises(BitmillError, match="manifest"):
        pipeline.load(package)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BitmillError, match="nowhere"):
        pipeline.load(tmp_path / "nowhere")


def test_too_little_memory_is_not_called_damage(tmp_path):
    with pytest.raises(MemoryError, match="package needs more memory than there is"), damage_of(tmp_path / "package"):
        torch.empty(1 << 55)
    with pytest.raises(DamagedError, match="package is damaged"), damage_of(tmp_path / "package"):
        torch.empty(-1)
