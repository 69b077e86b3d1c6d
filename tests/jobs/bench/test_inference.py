"""`bitmill bench inference` on a small GPT-2, each engine in its own process."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs.bench import inference
from jobs.cli import app
from pipeline.errors import RunError
from pipeline.models.build import load_model
from pipeline.package.package import read_package
from tests.packages import WIDE, package

SMALL = {"architecture": "gpt2", "n_layer": 1, "n_embd": 256, "n_head": 4, "n_positions": 64, "vocab_size": 300}


def bench(monkeypatch, folder, *arguments):
    monkeypatch.setenv("BITMILL_STORAGE_URI", str(folder / "store"))
    return CliRunner().invoke(app, ["bench", "inference", *arguments])


def test_every_engine_is_measured_on_the_same_model(tmp_path, monkeypatch):
    model = tmp_path / "package"
    model.mkdir()
    inference.write_random(model, SMALL, "quantgpt")
    found = bench(
        monkeypatch, tmp_path, "--model", str(model), "--tokens", "8", "--prompt", "4", "--rounds", "1", "--json"
    )
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["missing"] == {}
    assert "measure: round 1 of 1: int8" in found.stderr
    assert list(document["engines"]) == ["packed", "fp32", "int8", "llama.cpp"]
    for measures in document["engines"].values():
        assert set(measures) == set(inference.MEASURES)
        assert measures["decode_tokens_per_s"]["median"] > 0


def test_fp32_has_the_weights_of_the_package(tmp_path):
    model = tmp_path / "package"
    model.mkdir()
    inference.write_random(model, SMALL, "seq")
    folder, missing = inference.prepare(model, "seq", tmp_path / "cache")
    assert missing == {}
    packed, plain = read_package(model)[0], load_model(folder / "fp32")
    assert plain.transformer.wte.weight.equal(packed.weight("transformer.wte"))
    assert plain.transformer.h[0].mlp.c_fc.weight.T.equal(packed.weight("transformer.h.0.mlp.c_fc"))
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_an_engine_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'bitmill[bench]'" in inference._write_gguf(tmp_path, tmp_path / "gguf")


def test_an_engine_that_fails_says_why(tmp_path):
    with pytest.raises(RunError, match=r"packed ended with status 1: .*neither a packed model"):
        inference.run_engine("packed", tmp_path, 1, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantizer", "twn"], "valid: quantgpt, lsq, seq"),
        (["--model", "nowhere"], "not the folder of a packed model"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments, said, tmp_path, monkeypatch):
    found = bench(monkeypatch, tmp_path, *arguments)
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())


def test_an_encoder_and_decoder_is_refused(tmp_path, monkeypatch):
    model = package(tmp_path / "package", WIDE["bart"])
    found = bench(monkeypatch, tmp_path, "--model", str(model))
    assert found.exit_code == 2
    assert "this bench times decoders" in " ".join(found.output.split())
