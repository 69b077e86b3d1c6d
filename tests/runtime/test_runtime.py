"""The packed model in ONNX Runtime against the packed model in torch."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from pipeline.errors import BitmillError, ConfigError, DamagedError
from pipeline.package import manifest
from pipeline.package.package import load
from pipeline.quant.modules import InputQuantizer
from pipeline.runtime import Runtime
from tests.conftest import ARCHITECTURES
from tests.packages import WIDE, package, packed_logits, rms, signed

DRAW = np.random.default_rng(0)
IDS = DRAW.integers(3, 300, 24).tolist()
SOURCE = DRAW.integers(3, 300, 31).tolist()
NARROW = {name: {**fields, "vocab_size": 300} for name, fields in ARCHITECTURES.items()}
NARROW["llama"]["pad_token_id"] = None
VARIANTS = [
    {"bits": "2-2-8"},
    {"bits": "2-2-8", "granularity": "per_tensor"},
    {"bits": "2-2-8", "encoding": "base3"},
    {"bits": "2-2-8", "quantizer": "lsq"},
    {"bits": "2-2-8", "quantizer": "seq"},
    {"bits": "4-4-8"},
    {"bits": "4-8-8", "quantizer": "seq"},
    {"bits": "8-8-8"},
    {"bits": "32-2-8"},
    {"bits": "2-32-8"},
    {"bits": "2-2-8", "overrides": {r".*(c_proj|v_proj|down_proj)": 8}},
    {"bits": "2-2-8", "scale_dtype": "float16", "rest_dtype": "float16"},
]


def source_of(family: str) -> list[int] | None:
    return SOURCE if family == "bart" else None


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {family: package(folder / family, fields) for family, fields in WIDE.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@pytest.mark.parametrize("family", WIDE)
def test_weights_are_those_of_the_packed_model(family, variant, tmp_path):
    """With fp32 activations on both sides: every grid, width, encoding, and modules of different widths."""
    folder = package(tmp_path / "package", WIDE[family], **variant)
    found = Runtime(folder, activations=32).logits(IDS, source_of(family))
    wanted = packed_logits(folder, IDS, source_of(family), activations=32)
    assert wanted.std() > 0.3
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize(
    ("size", "quant"),
    [(32, {"quantizer": quantizer}) for quantizer in ("quantgpt", "lsq", "seq")]
    + [
        (32, {"encoding": "base3"}),
        (32, {"bits": "4-4-8", "overrides": {r".*(c_proj|v_proj|down_proj)": 8}, "quantizer": "seq"}),
        (64, {"bits": "4-8-8", "quantizer": "seq", "scale_dtype": "float16"}),
        (64, {"bits": "8-8-8", "quantizer": "lsq"}),
        (128, {"quantizer": "seq"}),
        (128, {"quantizer": "lsq"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", WIDE)
def test_weights_with_a_scale_a_group_are_those_of_the_packed_model(family, size, quant, tmp_path):
    """Levels with a half as well, for which each group of the input has a sum of its own."""
    folder = package(tmp_path / "package", WIDE[family], granularity={"per_group": size}, **quant)
    (name, shape), *_ = (
        (n, m["shape"]) for n, m in modules_of(folder).items() if n.endswith(("c_fc", "fc1", "up_proj"))
    )
    scale = load_file(folder / manifest.WEIGHTS)[f"{name}.weight_scale"]
    assert tuple(scale.shape) == (shape[0], shape[1] // size)
    assert size == shape[1] or (scale[:, 0] != scale[:, -1]).all()
    found = Runtime(folder, activations=32).logits(IDS, source_of(family))
    wanted = packed_logits(folder, IDS, source_of(family), activations=32)
    assert wanted.std() > 0.3
    assert np.abs(found - wanted).max() < 1e-4


def modules_of(folder):
    return json.loads((folder / manifest.CONFIG).read_text())["quantization_config"]["modules"]


@pytest.mark.parametrize("encoding", ["dense", "base3"])
@pytest.mark.parametrize("family", NARROW)
def test_widths_that_are_no_whole_blocks(family, encoding, tmp_path):
    folder = package(tmp_path / "package", NARROW[family], encoding)
    found = Runtime(folder, activations=32).logits(IDS, source_of(family))
    assert np.abs(found - packed_logits(folder, IDS, source_of(family), activations=32)).max() < 1e-4


@pytest.mark.parametrize("granularity", ["per_channel", {"per_group": 32}], ids=str)
@pytest.mark.parametrize("quantizer", ["quantgpt", "lsq", "seq"])
@pytest.mark.parametrize("family", WIDE)
def test_eight_bit_activations_cost_what_they_cost_the_student(family, quantizer, granularity, tmp_path):
    """A range a block against a range a token. Each deviates from fp32 activations by rounding; the stated tolerance
    is that the runtime does so by at most 1.5 times as much as the student, and is within twice that of the student."""
    folder = package(tmp_path / "package", WIDE[family], quantizer=quantizer, granularity=granularity)
    exact = packed_logits(folder, IDS, source_of(family), activations=32)
    student = packed_logits(folder, IDS, source_of(family))
    found = Runtime(folder).logits(IDS, source_of(family))
    rounding = rms(student - exact)
    assert 0 < rms(found - exact) <= 1.5 * rounding
    assert rms(found - student) <= 2 * rounding


@pytest.mark.parametrize("family", WIDE)
def test_decoding_with_a_cache_gives_what_a_whole_pass_gives(family, packages):
    """At every step the token that is most likely in a pass over all tokens so far, in full-precision activations."""
    runtime, source = Runtime(packages[family], activations=32), source_of(family)
    prompt = SOURCE if source else IDS * 3  # more than are fed at once
    tokens = list(runtime.generate(prompt, 20, stop=()))
    start = [runtime.config.decoder_start_token_id] if source else prompt
    logits = runtime.logits(start + tokens, source)
    assert tokens == logits[len(start) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("family", WIDE)
def test_the_same_tokens_as_transformers_generates(family, packages):
    model, runtime = load(packages[family]), Runtime(packages[family], activations=32)
    for module in model.modules():
        if isinstance(module, InputQuantizer):
            module.bits = 32
    prompt = SOURCE if family == "bart" else IDS[:5]
    plain = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, decoder_start_token_id=2)
    wanted = model.generate(torch.tensor([prompt]), generation_config=plain)[0].tolist()
    start = [2] if family == "bart" else prompt
    found = start + list(runtime.generate(prompt, 12, stop=()))
    assert found[:-1] == wanted[:-1]  # BART's configuration forces the very last one


def test_sampling_depends_on_the_seed_alone(packages):
    runtime = Runtime(packages["gpt2"])
    runs = [list(runtime.generate(IDS[:4], 16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert list(runtime.generate(IDS[:4], 16, temperature=1e-6)) == list(runtime.generate(IDS[:4], 16))


def test_it_ends_at_a_stop_token_and_where_the_positions_end(packages):
    runtime = Runtime(packages["gpt2"])
    free = list(runtime.generate(IDS, 1000, stop=()))
    assert len(IDS) + len(free) == runtime.config.n_positions
    stop = free[3]
    assert list(runtime.generate(IDS, 1000, stop=(stop,))) == free[: free.index(stop) + 1]


def test_a_prompt_that_does_not_fit_is_refused(packages):
    runtime = Runtime(packages["gpt2"])
    for prompt in ([], [5] * 129):
        with pytest.raises(ConfigError, match=f"{len(prompt)} tokens; the model takes 1 to 128"):
            next(runtime.generate(prompt, 4))


def test_nothing_is_left_on_disk(packages, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime = Runtime(packages["gpt2"])
    assert not list(tmp_path.iterdir())
    assert len(list(itertools.islice(runtime.generate(IDS[:4], 4, stop=()), 4))) == 4


def test_a_damaged_package_is_refused(packages, tmp_path):
    folder = shutil.copytree(packages["gpt2"], tmp_path / "package")
    weights = bytearray((folder / manifest.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / manifest.WEIGHTS).write_bytes(weights)
    with pytest.raises(DamagedError, match="does not match the manifest"):
        Runtime(folder)


def said(**fields):
    def damage(folder):
        config = json.loads((folder / manifest.CONFIG).read_text())
        (folder / manifest.CONFIG).write_text(json.dumps({**config, **fields}))

    return damage


def described(**module):
    def damage(folder):
        config = json.loads((folder / manifest.CONFIG).read_text())
        config["quantization_config"]["modules"]["transformer.h.0.mlp.c_fc"].update(module)
        (folder / manifest.CONFIG).write_text(json.dumps(config))

    return damage


def with_tensor(name, change):
    def damage(folder):
        tensors = load_file(folder / manifest.WEIGHTS)
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / manifest.WEIGHTS, metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (said(n_layer=1), "do not fit the architecture"),
        (said(n_layer=3), "do not fit the architecture"),
        (said(vocab_size=299), "do not fit the architecture"),
        (said(n_positions=64), "do not fit the architecture"),
        (said(n_head=3), "divisible"),
        (said(tie_word_embeddings=False), "do not fit the architecture"),
        (described(bits=2.9), "not a whole number"),
        (described(bits=3), "bits"),
        (described(shape=[512.0, 128]), "not a whole number"),
        (described(shape=[10**12, 10**12]), "packed bytes"),
        (with_tensor("transformer.h.1.mlp.c_fc.weight_scale", torch.neg), "not finite, or below zero"),
        (
            with_tensor("transformer.h.1.mlp.c_fc.weight_scale", lambda t: t.expand(-1, 8).contiguous()),
            "a scale of shape",
        ),
        (with_tensor("transformer.h.1.mlp.c_fc.weight_scale", lambda t: t[:-1].clone()), "a scale of shape"),
        (with_tensor("transformer.ln_f.weight", lambda t: t.to(torch.float8_e4m3fn)), "in which no package holds it"),
        (with_tensor("transformer.ln_f.weight", lambda t: t[None]), "do not fit the architecture|other tensors"),
    ],
    ids=range(15),
)
def test_a_package_that_is_not_what_its_config_says_is_refused(packages, tmp_path, damage, message):
    """By both that load packages, even with checksums that agree."""
    folder = shutil.copytree(packages["gpt2"], tmp_path / "package")
    damage(folder)
    signed(folder)
    with pytest.raises(DamagedError, match=message):
        Runtime(folder)
    with pytest.raises(DamagedError, match=message):
        load(folder)


def test_a_table_with_a_scale_a_group_is_refused(packages, tmp_path):
    folder = shutil.copytree(packages["gpt2"], tmp_path / "package")
    with_tensor("transformer.wte.weight_scale", lambda t: t.expand(-1, 4).contiguous())(folder)
    signed(folder)
    with pytest.raises(DamagedError, match=r"transformer\.wte is a table with one scale a group"):
        Runtime(folder)


@pytest.mark.parametrize("ids", [[3, 300], [-1], [5] * 129, []])
@pytest.mark.parametrize("family", WIDE)
def test_ids_that_the_model_does_not_have_are_refused(family, ids, packages):
    runtime = Runtime(packages[family])
    with pytest.raises(ConfigError, match=r"not one of the model's, 0 to 299|the model takes 1 to 128"):
        next(runtime.generate(ids, 4))
    with pytest.raises(ConfigError, match=r"not one of the model's, 0 to 299|the model takes 1 to 128"):
        runtime.logits(ids, source_of(family))
    if family == "bart":
        with pytest.raises(ConfigError, match=r"not one of the model's, 0 to 299|the model takes 1 to 128"):
            runtime.logits(IDS, ids)


@pytest.mark.parametrize("start", [None, -3, 10**6])
def test_a_decoder_that_starts_with_no_token_of_its_own_is_refused(packages, tmp_path, start):
    folder = shutil.copytree(packages["bart"], tmp_path / "package")
    said(decoder_start_token_id=start)(folder)
    signed(folder)
    with pytest.raises(ConfigError, match="not one of the model's"):
        next(Runtime(folder).generate(SOURCE, 4))


def test_a_head_size_that_no_kernel_takes_is_refused(tmp_path):
    folder = package(tmp_path / "package", {**WIDE["gpt2"], "n_head": 32})
    with pytest.raises(ConfigError, match="multiples of 8, not 4"):
        Runtime(folder)


def test_a_digest_that_is_not_the_packages_is_refused(packages, tmp_path):
    folder = shutil.copytree(packages["gpt2"], tmp_path / "package")
    fields = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).write_text(json.dumps(fields | {"digest": "0" * 64}))
    with pytest.raises(DamagedError, match=r"has another digest than config\.json"):
        Runtime(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(BitmillError, match="neither a packed model nor an ONNX export"):
        Runtime(tmp_path)
