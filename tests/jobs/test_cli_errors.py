"""Bad input: exit status 2 and one readable paragraph, before any worker starts."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.store.step_store import StepDir
from pipeline.tasks.tokenizers import train_bpe

Usage = namedtuple("Usage", "total used free")
NEOX = {"architecture": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture
def refused(tmp_path, monkeypatch, tiny_fields):
    """`refused(*arguments, section={...})`: what `bitmill compress` says to a file with these sections, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def compress(*arguments, **overrides):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_fields(tmp_path, **overrides)))
        message = said("compress", path, *arguments)
        assert not list(tmp_path.rglob("record.json"))
        return message

    return compress


def said(*arguments, status=2):
    """What a failing command says on stderr, as one line."""
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(shown.exception, SystemExit), repr(shown.exception)
    assert (shown.exit_code, shown.stdout) == (status, ""), shown.stderr
    assert "Traceback" not in shown.stderr
    assert "\n\n" not in shown.stderr.strip()
    assert not ray.is_initialized()
    return " ".join(shown.stderr.split())


def holds(message, *needles):
    for needle in needles:
        assert needle in message


@pytest.mark.parametrize(
    ("overrides", "needles"),
    [
        ({"data": {"source": "nowhere/*.txt"}}, ["data.source is 'nowhere/*.txt'", "no file matches", ".jsonl"]),
        ({"data": {"validation": "nowhere.txt"}}, ["data.validation is 'nowhere.txt'"]),
        ({"data": {"source": "s3:/x.csv"}}, ["data.source is 's3:/x.csv'"]),
        ({"data": {"source": "python://shakespeare"}}, ["python://shakespeare", "python://chitchat"]),
        ({"data": {"source": "hf://org/name@main/*.parquet"}}, ["data.source", "hf://org/name@main"]),
        ({"distil": {"steps": 3}}, ["distil: unknown key", "distill"]),
        ({"distill": {"stepz": 3}}, ["distill.stepz: unknown key", "steps"]),
        ({"distill": {"epochs": 3}}, ["distill", "exactly one of steps and epochs"]),
        ({"distill": {"steps": -1}}, ["distill.steps", "-1"]),
        ({"quant": {"bits": "3-3-8"}}, ["quant.bits", "3-3-8", "3 bits are not offered for weights", "2, 4, 8, 32"]),
        ({"quant": {"bits": "2-2-4"}}, ["quant.bits", "2-2-4", "4 bits are not offered for activations", "8, 32"]),
        ({"quant": {"bits": "two"}}, ["quant.bits", "'two'", "2-2-8"]),
        ({"quant": {"overrides": {".*wte": 3}}}, ["overrides['.*wte']", "3 bits", "2, 4, 8, 32"]),
        ({"quant": {"overrides": {"nothing": 8}}}, ["quant.overrides", "'nothing' matches no module", "wte"]),
        ({"quant": {"quantizer": "magic"}}, ["quant.quantizer", "'magic'", "quantgpt"]),
        ({"pack": {"encoding": "base3"}, "quant": {"bits": "4-4-8"}}, ["pack.encoding", "4-4-8", "dense"]),
        ({"task": {"block_length": 64}}, ["task.block_length is 64", "32 positions"]),
        ({"finetune": None}, ["model.source", "finetune"]),
        ({"finetune": {"batch_size": 2}, "resources": {"workers": 3}}, ["finetune.batch_size", "resources.workers"]),
        ({"resources": {"storage_uri": "gs://bucket/x"}}, ["resources.storage_uri", "gs://bucket/x", "s3://"]),
        ({"resources": {"storage_uri": 7}}, ["resources.storage_uri", "7"]),
        ({"model": {"source": {"architecture": "gpt5"}}}, ["model.source.architecture is 'gpt5'", "gpt2", "llama"]),
        ({"model": {"source": {"architecture": "gpt2", "layers": 2}}}, ["model.source.layers", "n_layer"]),
        ({"model": {"source": {"architecture": "led"}}}, ["'led'", "gpt2", "llama", "model.family"]),
        ({"model": {"source": {"architecture": "xlnet"}}}, ["xlnet", "transformer.mask_emb", "model.family"]),
        ({"model": {"source": NEOX, "family": "gpt2"}}, ["gpt2", "layer", "gpt_neox"]),
        ({"model": {"source": {"architecture": "llama", "hidden_size": 30}}}, ["model.source", "hidden size"]),
        ({"model": {"source": {"architecture": "gpt2", "n_layer": "two"}}}, ["model.source", "n_layer", "two"]),
        ({"model": {"source": "./nowhere", "tokenizer": None}}, ["model.source is './nowhere'", "no such directory"]),
        ({"model": {"source": "org/name"}}, ["train_bpe", "model.source"]),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_its_knob_and_what_is_valid(refused, overrides, needles):
    holds(refused(**overrides), *needles)


@pytest.mark.parametrize(
    ("name", "content", "needles"),
    [
        ("empty.txt", b"", ["data.source", "empty.txt is empty"]),
        ("blank.txt", b" \n\n \n", ["0 tokens", "task.block_length (now 32)"]),
        ("short.txt", b"Only a few words here.\n", ["shorter than one block", "task.block_length (now 32)"]),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 500, ["latin.txt", "UTF-8"]),
        ("text.pdf", b"%PDF", ["data.source", "text.pdf", ".jsonl"]),
        ("rows.jsonl", b'{"body": "x"}\n' * 9, ["rows.jsonl", "'text'; valid: body", "data.text_column"]),
        ("rows.jsonl", b"no json\n" * 9, ["rows.jsonl", "JSON"]),
        ("rows.parquet", b"no parquet\n" * 9, ["rows.parquet", "data"]),
    ],
)
def test_text_that_cannot_be_read_or_is_too_short(refused, tmp_path, name, content, needles):
    (tmp_path / name).write_bytes(content)
    holds(refused(data={"source": str(tmp_path / name)}), *needles)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--until", "nonsense"], ["--until 'nonsense'", "tokenize, finetune, cache"]),
        (["--report", "page.txt"], ["--report is 'page.txt'", "ends in .html"]),
        (["--report", "/proc/nowhere/page.html"], ["--report '/proc/nowhere/page.html' cannot be written to"]),
        (["--report", "page.html", "--until", "cache"], ["--report page.html shows a whole run", "--until cache"]),
        (["--set", "nonsense"], ["--set 'nonsense'", "section.key=value"]),
        (["--set", "distill.steps"], ["--set 'distill.steps'", "section.key=value"]),
        (["--set", "distill.steps=many"], ["distill.steps", "'many'"]),
        (["--set", "distill.steps=[1"], ["--set 'distill.steps=[1'", "YAML"]),
        (["--set", "name.x=1"], ["--set 'name.x=1'", "name is a value"]),
        (["--set", "nothing.x=1"], ["nothing", "unknown key", "distill"]),
        (["--bits", "5-5-8"], ["5-5-8", "2, 4, 8, 32"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=str,
)
def test_a_bad_option_is_named(refused, arguments, needles):
    holds(refused(*arguments), *needles)


@pytest.mark.parametrize("content", [None, "- a\n- b\n", "a: [", "\xff", "7"])
def test_a_file_that_is_no_configuration(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    holds(said("compress", path), "config.yaml", "configuration")


def test_tokenizer_and_model_of_different_vocabularies(refused, checkpoint, corpus, tmp_path):
    train_bpe([corpus.read_text()], 280).save_pretrained(tmp_path / "other")
    message = refused(model={"source": str(checkpoint), "tokenizer": str(tmp_path / "other")}, finetune=None)
    holds(message, "280 tokens", "the model 300", "model.source", "model.tokenizer", str(tmp_path / "other"))


def test_a_model_whose_weights_are_not_safetensors(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(model={"source": str(folder), "tokenizer": None}, finetune=None)
    holds(message, "model.source", str(folder), "safetensors")


def test_a_model_that_the_hub_does_not_give(refused):
    message = refused(model={"source": "org/name", "tokenizer": None}, finetune=None)
    holds(message, "model.source is 'org/name'", "no such directory", "hub")


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_no_space_for_the_cache(refused, monkeypatch, tmp_path, plan):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - 5000, 5000))
    message = refused(*plan)
    holds(message, "cache", "MiB", str(tmp_path / "store"), "cache.mode: online", "resources.storage_uri")


def test_no_space_is_needed_online(tiny_fields, monkeypatch, tmp_path):
    monkeypatch.setattr(StepDir, "free_bytes", lambda step_dir: 5000)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path, cache={"mode": "online"})))
    shown = CliRunner().invoke(app, ["compress", str(path), "--plan", "--json"])
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["cache_bytes"] == 0


@pytest.mark.parametrize("own_scratch", [True, False])
def test_a_storage_path_that_is_not_writable(refused, tmp_path, own_scratch):
    (tmp_path / "file").write_text("a regular file")
    uri = str(tmp_path / "file" / "store")
    scratch = str(tmp_path / "scratch") if own_scratch else None
    holds(refused(resources={"storage_uri": uri, "local_cache_dir": scratch}), "resources.storage_uri", uri)


def test_a_namespace_stays_below_the_store(refused, tmp_path):
    needles = ("namespace: '..' is no name", "valid: letters, digits")
    holds(refused(resources={"namespace": ".."}), "resources.", *needles)
    holds(said("report", "0" * 32, "--out", tmp_path / "page.html", "--namespace", ".."), *needles)


def test_a_local_cache_dir_that_is_not_writable(refused, tmp_path):
    (tmp_path / "file").write_text("a regular file")
    folder = str(tmp_path / "file" / "scratch")
    holds(refused(resources={"local_cache_dir": folder}), "resources.local_cache_dir", folder)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x", "sqlite:////dev/null/x.db"])
def test_a_tracking_server_that_cannot_be_reached_is_found_before_anything_runs(refused, tmp_path, uri):
    holds(refused(resources={"tracking_uri": uri}), "resources.tracking_uri", uri)
    assert not list(tmp_path.rglob("record.json"))


def test_a_step_that_another_process_runs_is_not_waited_for_if_so_asked(tiny_fields, cloned, finished):
    path = cloned / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(cloned, quant={"bits": "4-4-8"})))
    shown = CliRunner().invoke(app, ["compress", str(path), "--plan", "--json"])
    key = json.loads(shown.stdout)["stages"][3]["key"]
    with StepDir(str(cloned / "store"), "distill", key, str(cloned)).hold(True, print):
        message = said("compress", path, "--no-wait", status=1)
    holds(message, f"distill step {key}", "is being run by process")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["MODEL", "--data", "nowhere.txt"], ["--data", "nowhere.txt"]),
        (["MODEL", "--data", "TEXT", "--unit", "page"], ["--unit is 'page'", "document, line"]),
        (["MODEL", "--data", "TEXT", "--block-length", "64"], ["--block-length is 64", "32 positions"]),
        (["./nowhere", "--data", "TEXT"], ["MODEL is './nowhere'", "no such directory"]),
        (["nobody@champion", "--data", "TEXT"], ["MODEL is 'nobody@champion'", "no such", "Registered models"]),
        ([".", "--data", "TEXT"], ["MODEL is '.'", "neither a packed model nor"]),
    ],
    ids=str,
)
def test_evaluate_names_what_it_cannot_use(finished, corpus, tmp_path, monkeypatch, arguments, needles):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(finished.package), "TEXT": str(corpus)}
    holds(said("evaluate", *(places.get(argument, argument) for argument in arguments)), *needles)


def test_evaluate_refuses_a_damaged_package(finished, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(finished.package, tmp_path / "package"))
    (folder / "config.json").write_text("{}")
    holds(said("evaluate", folder, "--data", corpus, status=1), "config.json", "does not match the manifest")


def test_an_error_that_nobody_foresaw_is_one_paragraph_and_debug_shows_it(tmp_path, monkeypatch):
    def broken(*_):
        raise LookupError("a [bracketed] surprise")

    monkeypatch.setattr("pipeline.config.load.load_config", broken)
    holds(said("compress", tmp_path / "any.yaml", status=1), "LookupError", "a [bracketed] surprise", "--debug")
    shown = CliRunner().invoke(app, ["compress", str(tmp_path / "any.yaml"), "--debug"])
    assert isinstance(shown.exception, LookupError)


@pytest.mark.parametrize("name", ["quantizers", "train", "real", "scale", "chaos"])
def test_the_folder_of_a_bench_is_no_file(tmp_path, name):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        said = CliRunner().invoke(app, ["bench", name, "--out", str(out)])
        assert said.exit_code == 2
        holds(said.stderr, f"--out {out}: {tmp_path / 'file'} is no directory that you may write to; give another.")
