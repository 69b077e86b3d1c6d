"""`bitmill generate` and `bitmill pull` as a user gives them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import pipeline
from jobs.cli import app
from pipeline.store.locations import tracking_uri
from pipeline.tasks.summarization import summaries
from pipeline.tasks.tokenizers import PADDING, read_tokenizer, train_bpe
from tests.package.test_hf_plugin import packed
from tests.packages import WIDE, package, signed


@pytest.fixture
def bitmill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **how: CliRunner().invoke(app, [str(argument) for argument in arguments], **how)


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory):
    """A BART of random weights with a tokenizer."""
    folder = packed(tmp_path_factory.mktemp("bart") / "package", "bart")
    train_bpe(["some words of a text to sum up"], 300, ("<|endoftext|>", PADDING)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    signed(folder)
    return folder


def test_the_text_is_what_transformers_writes(finished, bitmill):
    shown = bitmill("generate", finished.package, "Bado", "--max-tokens", 8, "--temperature", 0, "--json")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    model, tokenizer = pipeline.load(finished.package), read_tokenizer(finished.package)
    ids = torch.tensor([tokenizer("Bado")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert document["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert (document["prompt"], document["tokens"]) == ("Bado", len(expected))
    streamed = bitmill("generate", finished.package, "Bado", "--max-tokens", 8, "--temperature", 0)
    assert streamed.stdout == document["text"] + "\n"


def test_a_seed_draws_the_same_text_and_another_seed_another(finished, bitmill):
    def text(*options):
        return bitmill("generate", finished.package, "Bado", "--max-tokens", 12, *options).stdout

    assert text("--seed", 3) == text("--seed", 3)
    assert len({text("--seed", seed) for seed in range(4)}) > 1


def test_the_prompt_may_come_from_stdin_and_the_model_from_the_registry(finished, bitmill, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(finished.plan.config.resources))
    options = ("--max-tokens", 4, "--temperature", 0, "--json")
    piped = bitmill("generate", "tiny@champion", *options, input="Bado mika\n")
    given = bitmill("generate", finished.package, "Bado mika", *options)
    assert json.loads(piped.stdout)["text"] == json.loads(given.stdout)["text"]


def test_what_does_not_fit_the_positions_is_said(finished, bitmill):
    cut = bitmill("generate", finished.package, "Bado", "--max-tokens", 1000, "--json")
    assert "the model's 32 positions leave room for" in cut.stderr
    assert json.loads(cut.stdout)["tokens"] <= 32
    refused = bitmill("generate", finished.package, "Bado " * 100)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "the model has 32 positions; shorten it" in " ".join(refused.stderr.split())


def test_a_folder_that_holds_no_model_is_named(bitmill, tmp_path):
    (tmp_path / "empty").mkdir()
    shown = bitmill("generate", tmp_path / "empty", "Bado")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "config.json" in shown.stderr


def test_a_package_is_checked_before_anything_in_it_is_used(finished, bitmill, tmp_path):
    folder = shutil.copytree(finished.package, tmp_path / "altered")
    altered = (folder / "tokenizer.json").read_text().replace("a", "b", 1)
    (folder / "tokenizer.json").write_text(altered)
    shown = bitmill("generate", folder, "Bado")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "tokenizer.json is missing or does not match the manifest" in " ".join(shown.stderr.split())


def test_a_head_size_that_the_packed_runtime_does_not_take_runs_in_torch(finished, bitmill, tmp_path):
    folder = package(tmp_path / "package", {**WIDE["gpt2"], "n_head": 32})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finished.package / name, folder / name)
    signed(folder)
    shown = bitmill("generate", folder, "Bado", "--max-tokens", 4, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["tokens"] == 4
    assert "multiples of 8, not 4. It runs in torch." in " ".join(shown.stderr.split())


def test_an_empty_prompt_starts_from_nothing(finished, bitmill):
    assert bitmill("generate", finished.package, "", "--max-tokens", 3).exit_code == 0


def test_a_summarizer_takes_the_prompt_as_its_source(summarizer, bitmill):
    shown = bitmill("generate", summarizer, "some words of a text " * 20, "--max-tokens", 6, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert "the model reads the first 40" in shown.stderr
    tokenizer = read_tokenizer(summarizer)
    ids = tokenizer("some words of a text " * 20)["input_ids"][:39]
    source = torch.tensor([[*ids, tokenizer.eos_token_id]])
    expected = summaries(pipeline.load(summarizer), source, torch.ones_like(source), 7, 6)
    assert json.loads(shown.stdout)["text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("model", ["folder", "tiny@champion", "tiny/1", "file"])
def test_a_pulled_model_is_the_model(finished, bitmill, monkeypatch, tmp_path, model):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(finished.plan.config.resources))
    source = {"folder": finished.package, "file": f"file://{finished.package}"}.get(model, model)
    shown = bitmill("pull", source, tmp_path / "model", "--json")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["digest"] == finished.record("pack").digest
    assert document["kept"] == []
    assert sorted([*document["fetched"], "manifest.json"]) == sorted(p.name for p in (tmp_path / "model").iterdir())
    assert "each checked" in shown.stderr
    assert all(f"{name}: done in" in shown.stderr for name in document["fetched"])
    again = json.loads(bitmill("pull", source, tmp_path / "model", "--json").stdout)
    assert (again["fetched"], again["kept"]) == ([], document["fetched"])


@pytest.mark.parametrize(
    ("model", "status", "needle"),
    [
        ("nowhere@champion", 2, "the registry does not have it"),
        ("ftp://x/y", 2, "valid: a directory, or s3://"),
        ("empty", 2, "no packed model lies there"),
        ("damaged", 1, "README.md is not what its manifest says"),
    ],
)
def test_a_pull_that_cannot_work_says_why_and_leaves_nothing(
    finished, bitmill, tmp_path, monkeypatch, model, status, needle
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(finished.plan.config.resources))
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished.package, tmp_path / "damaged")
    (tmp_path / "damaged" / "README.md").write_text("other")
    shown = bitmill("pull", model, "model")
    assert (shown.exit_code, shown.stdout) == (status, ""), shown.stderr
    assert needle in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "model").exists()
