"""Thousands of broken packages: each ends in an error of ours or in the very same tensors, and none asks for memory.

Seeded, so that a failure can be seen again; most mutations get their checksums re-made, as an attacker would.
"""

from __future__ import annotations

import copy
import json
import random
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import pipeline.plugin  # noqa: F401 - which teaches transformers the format
from pipeline.config.quant import Quant
from pipeline.errors import BitmillError, DamagedError
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import freeze_student, make_student
from pipeline.package.package import load, read_package, write_package
from pipeline.runtime import Runtime
from pipeline.runtime.weights import read_weights
from pipeline.store.step_store import checksum
from tests.conftest import ARCHITECTURES
from tests.package.test_package import FACTS

MUTATIONS = {"gpt2": 1400, "bart": 700}
RUNTIME_MUTATIONS, PLUGIN_MUTATIONS = 150, 100
MOST_BYTES = 256 * 2**20
SMALL = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8},
    "bart": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "max_position_embeddings": 8},
}
HOSTILE = [
    *(0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**13, 10**30, 0.5, -0.0, float("nan"), float("inf"), 1e308),
    *(None, True, False, "", "x", "float16", "int8", "base3", "../../etc/passwd", "/dev/zero", "a" * 5000, "\0"),
    *([], [1], [0, 0], [10**9, 10**9], [-1, -1], {}, {"shape": [10**12]}, [[]], {"": None}),
]
DTYPES = ["U8", "I8", "F16", "F32", "F64", "BOOL", "F8_E4M3", "I64", "X9", "", 3]


def package(folder, architecture):
    quant = Quant(
        quantizer="lsq_symmetric",
        granularity="per_channel",
        scale_dtype="float16",
        rest_dtype="float16",
        positions="int8",
    )
    config = read_config(ARCHITECTURES[architecture] | SMALL[architecture], vocab_size=24)
    model = build(config, seed=0)
    make_student(model, quant.spec(), family_named(architecture))
    frozen = freeze_student(model, quant, family_named(architecture))
    folder.mkdir()
    write_package(folder, frozen, config, quant, "base3", architecture, FACTS)
    return folder


def flip(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(draw, data):
    return data[: draw.randrange(len(data))]


def splice(draw, data):
    at, length = draw.randrange(len(data)), draw.randrange(1, 64)
    piece = draw.choice([draw.randbytes(length), data[at : at + length], b"\0" * length, b"[" * 3000])
    return data[:at] + piece + data[draw.choice([at, min(len(data), at + length)]) :]


def places(value, path=()):
    """The path to every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edit_json(draw, data):
    """Replace, remove, rename or swap values, or say a key twice."""
    document = json.loads(data)
    *parents, key = draw.choice(list(places(document)))
    holder = document
    for name in parents:
        holder = holder[name]
    how = draw.choice(["replace", "replace", "replace", "nudge", "remove", "add", "twice"])
    if how == "replace":
        holder[key] = draw.choice(HOSTILE)
    elif how == "nudge" and type(holder[key]) is int:
        holder[key] += draw.choice([-1, 1, 8, 1000])
    elif how == "remove":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[draw.choice([str(key) + "x", "auto_map", "num_labels", "n_layer", "decoder_layers"])] = draw.choice(
            HOSTILE
        )
    text = json.dumps(document)
    if how == "twice" and isinstance(key, str):
        text = text.replace(f'"{key}":', f'"{key}": {json.dumps(draw.choice(HOSTILE))}, "{key}":', 1)
    return text.encode()


def edit_header(draw, data):
    """Change what a safetensors header says about its tensors; the bytes stay."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = copy.deepcopy(header[name])
    how = draw.choice(["dtype", "shape", "offsets", "rename", "remove", "twice", "length"])
    if how == "dtype":
        header[name]["dtype"] = draw.choice(DTYPES)
    elif how == "shape":
        header[name]["shape"] = draw.choice(
            [[], [10**15], [0], [2**32, 2**32], [-1], entry["shape"][::-1], [1, *entry["shape"]]]
        )
    elif how == "offsets":
        header[name]["data_offsets"] = draw.choice([[0, 0], [0, 10**15], [5, 2], [-1, 4], [0, len(data)], [1]])
    elif how == "rename":
        header[draw.choice(["x", "", "../x", name + ".weight", "final_logits_bias"])] = header.pop(name)
    elif how == "remove":
        del header[name]
    text = json.dumps(header).encode()
    if how == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    claimed = draw.choice([0, 2**63, 2**40, len(data), 10**8]) if how == "length" else len(text)
    return claimed.to_bytes(8, "little") + text + data[8 + length :]


def edit_values(draw, data):
    """Overwrite the bytes of one tensor: NaN and infinite scales, codes outside the grid."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    first, last = (8 + length + offset for offset in entry["data_offsets"])
    pattern = draw.choice([b"\xff", b"\x00", b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xf3", draw.randbytes(7)])
    return data[:first] + (pattern * (last - first))[: last - first] + data[last:]


JSON = ("config.json", "manifest.json", "generation_config.json")
KINDS = [
    *[(kind, name) for kind in (flip, cut, splice) for name in ("config.json", "manifest.json", "model.safetensors")],
    *[(edit_json, name) for name in ("config.json", "config.json", "config.json", "manifest.json", *JSON)],
    *[(kind, "model.safetensors") for kind in (edit_header, edit_header, edit_header, edit_values, edit_values)],
]


def sign(folder):
    """Checksums that agree with what lies there, if the manifest can still be read."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: checksum(folder / name).model_dump() for name in manifest["files"]}
        path.write_text(json.dumps(manifest))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        pass


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.fixture
def little_memory():
    """Room for a quarter of a gigabyte more than now: a larger request fails where it is made."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_no_mutation_gives_other_tensors_a_foreign_error_or_a_large_allocation(tmp_path, architecture, little_memory):
    folder = package(tmp_path / "package", architecture)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected, digest = load(folder).state_dict(), read_package(folder)[0].digest()
    draw, outcomes, messages = random.Random(architecture), Counter(), Counter()
    mutations = MUTATIONS[architecture]
    for number in range(mutations):
        kind, name = draw.choice(KINDS)
        (folder / name).write_bytes(kind(draw, whole[name]))
        if draw.random() < 0.7:
            sign(folder)
        try:
            if name == "config.json":
                state = load(folder).state_dict()
            else:  # the same without a model, which takes most of the time and which config.json alone decides
                state = expected if read_package(folder)[0].digest() == digest else {}
        except BitmillError as error:
            outcomes[kind.__name__, "refused"] += 1
            messages["checksum" if "does not match the manifest" in str(error) else "deeper"] += 1
            for cause in causes(error):
                asked = isinstance(cause, MemoryError) or "allocate" in str(cause)
                assert not asked, (number, kind, name, cause)
        except Exception as error:
            pytest.fail(f"mutation {number}, {kind.__name__} of {name}: {type(error).__name__}: {error}")
        else:
            outcomes[kind.__name__, "loaded"] += 1
            assert state.keys() == expected.keys(), (number, kind, name)
            assert all(torch.equal(state[key], expected[key]) for key in expected), (number, kind, name)
        for file in ("manifest.json", name):
            (folder / file).write_bytes(whole[file])
    print(f"{architecture}: {mutations} mutations; {dict(outcomes)}; {dict(messages)}")
    assert sum(outcomes.values()) == mutations
    assert messages["deeper"] > mutations / 3  # past the checksums
    assert {path.name for path in tmp_path.iterdir()} == {"package"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_the_runtime_refuses_a_mutation_or_runs_it(tmp_path, architecture, little_memory):
    """Either an error of ours, or a graph that runs: on the same weights, unless they were changed and signed anew."""
    folder = package(tmp_path / "package", architecture)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = read_weights(folder)[0]
    source = [1, 2, 3] if architecture == "bart" else None
    draw, outcomes = random.Random(f"runtime {architecture}"), Counter()
    for number in range(RUNTIME_MUTATIONS):
        kind, name = draw.choice(KINDS)
        (folder / name).write_bytes(kind(draw, whole[name]))
        sign(folder)
        try:
            found = read_weights(folder)[0]
            logits = Runtime(folder).logits([1, 2, 3], source)
        except BitmillError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"mutation {number}, {kind.__name__} of {name}: {type(error).__name__}: {error}")
        else:
            outcomes["ran"] += 1
            assert logits.shape == (3, 24)
            if name == "config.json":  # what the weights are is decided by it; their values are not
                assert found.matrices.keys() == expected.matrices.keys()
                for module, matrix in expected.matrices.items():
                    assert np.array_equal(found.matrices[module].data, matrix.data), (number, kind)
        for file in ("manifest.json", name):
            (folder / file).write_bytes(whole[file])
    assert sum(outcomes.values()) == RUNTIME_MUTATIONS
    assert min(outcomes["refused"], outcomes["ran"]) > 10, outcomes


def test_the_plugin_loads_the_very_tensors_or_nothing(tmp_path):
    folder = package(tmp_path / "package", "gpt2")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    draw, outcomes = random.Random("plugin"), Counter()
    for number in range(PLUGIN_MUTATIONS):
        kind = draw.choice([flip, cut, splice, edit_header, edit_header, edit_values])
        (folder / "model.safetensors").write_bytes(kind(draw, whole["model.safetensors"]))
        try:
            found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        except (DamagedError, SafetensorError, OSError) as error:  # transformers opens the file before we do
            outcomes[type(error).__name__] += 1
        else:
            outcomes["loaded"] += 1
            assert all(torch.equal(found[key], expected[key]) for key in expected), (number, kind)
    assert outcomes["DamagedError"] > PLUGIN_MUTATIONS / 4, outcomes


def test_there_are_at_least_two_thousand_mutations():
    assert sum(MUTATIONS.values()) >= 2000
