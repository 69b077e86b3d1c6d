"""What is kept and what is not: measured differences, reasons, deleted files, verdicts in MLflow."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import export
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, RunError
from pipeline.export import FORMATS, dequantized, format_named, gguf
from pipeline.export.probes import Probes, lengths, make_probes
from pipeline.export.verify import measure, reasons_against
from pipeline.package.package import load
from pipeline.store.locations import tracking_uri
from pipeline.tracking import registry, runs

GOOD = {
    "delta_max": 0.02,
    "delta_p999": 0.01,
    "covered": 0.9,
    "disagreements": 0,
    "perplexity_packed": 10.0,
    "perplexity_export": 10.04,
}


def bitmill(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({}, None, None),
        ({}, 2.0**-11, None),
        ({}, 0.01, "reads back 0.01 off its levels"),
        ({}, float("nan"), "reads back nan off"),
        ({"disagreements": 3}, None, "at 3 steps it prefers another token .* more than 0.02 nats"),
        ({"covered": 0.49}, None, "only 49% of the steps are decided; at least 50% are needed"),
        ({"perplexity_export": 10.06}, None, "its perplexity differs by 0.60%, more than 0.5%"),
        ({"delta_max": float("nan")}, None, "not finite"),
    ],
)
def test_each_reason_is_said_with_its_numbers(change, error, reason):
    found = reasons_against({**GOOD, **change}, error)
    if reason is None:
        assert found == ()
    else:
        assert len(found) == 1
        assert re.search(reason, found[0])


def test_a_runtime_is_measured_against_independent_arithmetic(finished):
    """A runtime that shifts every logit and disturbs one token: the shift does not count, the disturbance does."""
    model = load(finished.package)
    probes = make_probes(model, None)
    prompt, steps = lengths(32)
    assert probes.paths.shape == probes.rows.shape == (20, prompt + steps)

    @torch.no_grad()
    def disturbed(ids):
        logits = model(torch.tensor([ids])).logits[0].numpy() + 3.0
        logits[:, 7] += 0.1
        return logits

    found = measure(model, disturbed, Probes(probes.rows[:2], probes.paths[:2], steps))
    with torch.no_grad():
        logits = model(probes.paths[:2]).logits[:, prompt - 1 : -1].double().numpy()
    wrong = logits.copy()
    wrong[..., 7] += 0.1
    ours, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, wrong))
    assert found["delta_max"] == pytest.approx(np.abs(ours - theirs).max(), abs=1e-5)
    assert found["agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    greedy = logits.argmax(-1)
    ended = greedy == model.config.eos_token_id  # a path goes on where the model would have ended
    assert ((greedy == probes.paths[:2, prompt:].numpy()) | ended).all()


def test_an_export_that_computes_otherwise_is_deleted_and_the_reasons_are_said(trained, tmp_path, monkeypatch):
    honest = gguf.pack_blocks
    monkeypatch.setattr(gguf, "pack_blocks", lambda codes, scale, *rest: honest(codes, scale * 1.05, *rest))
    done = bitmill("export", trained("gpt2"), "--format", "gguf", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "was deleted: a tensor reads back 0.05 off its levels" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_before_anything_is_written(trained, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for model, name, out, message in (
        (trained("gpt2"), "compressed-tensors", "out", "takes llama models, not gpt2"),
        (trained("gpt2"), "gguff", "out", "--format is 'gguff'; valid: transformers, onnx, gguf"),
        (trained("gpt2"), "gguf", "link", "exists and is not an empty directory"),
        (trained("gpt2"), "gguf", "full/mine.txt/out", "cannot be made"),
        (trained("gpt2"), "gguf", "full", "exists and is not an empty directory"),
        (checkpoint, "gguf", "out", "not a packed model"),
    ):
        done = bitmill("export", model, "--format", name, "--out", tmp_path / out)
        assert done.exit_code == 2
        assert message in done.stderr
    monkeypatch.setattr("pipeline.export.util.find_spec", lambda name: None if name == "xllamacpp" else object())
    with pytest.raises(ConfigError, match=r"verified with xllamacpp, which is not installed.*bitmill\[export\]"):
        format_named("gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link"]


@pytest.mark.parametrize("name", ["gguf", "compressed-tensors"])
def test_formats_of_one_scale_a_row_refuse_scales_of_groups(trained, tmp_path, name):
    package = trained("llama in groups")
    with pytest.raises(ConfigError, match=rf"--format {name} .* per_group 32\. Valid for it: onnx, transformers\."):
        export(str(package), name, tmp_path / "out", None, 1, Resources(), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_text_may_be_the_probe_and_a_short_one_is_refused(trained, corpus, tmp_path):
    done = bitmill(
        "export", trained("gpt2"), "--format", "transformers", "--out", tmp_path / "a", "--data", corpus, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["probe"] == str(corpus)
    for line in ("write: started", "prompts: done in", "verify: 10/40", "verify: 40/40"):
        assert line in done.stderr
    short = tmp_path / "short.txt"
    short.write_text("Too little.")
    with pytest.raises(ConfigError, match="fills 0 rows of 80 tokens; 20 are needed"):
        export(str(trained("gpt2")), "transformers", tmp_path / "b", str(short), 1, Resources(), Console(quiet=True))


def test_verdicts_of_a_registered_model_are_kept_with_it(tiny_config, trained, run_flow, tmp_path, monkeypatch):
    """Formats that passed are a tag of the version and its logged model; one that fails later leaves the list."""
    root = trained("gpt2").parents[3]
    shutil.copytree(root / "store", tmp_path / "store")
    resources = Resources(storage_uri=str(tmp_path / "store"))
    client = runs.connect(tracking_uri(resources))
    experiment = runs.experiment_id(client, "x", (tmp_path / "artifacts").as_uri())
    run = runs.find_or_create_run(client, experiment, "k", "x")
    version, model_id = registry.register_package(client, run, "x", "k", trained("gpt2"), {}, {})

    def formats():
        tags = client.get_model_version("x", version.version).tags, client.get_logged_model(model_id).tags
        return [each.get("bitmill.formats") for each in tags]

    export("x@champion", "transformers", tmp_path / "a", None, 1, resources, Console(quiet=True))
    assert formats() == ["bitmill,transformers"] * 2
    kept = json.loads((tmp_path / "a" / "verdict.json").read_text())
    stored = client.download_artifacts(run.info.run_id, "exports/transformers.json", str(tmp_path))
    assert json.loads(Path(stored).read_text()) == kept
    monkeypatch.setitem(dequantized.__dict__, "open_logits", lambda out, threads: lambda ids: np.zeros((len(ids), 300)))
    with pytest.raises(RunError, match="transformers export of x/1 was deleted"):
        export("x/1", "transformers", tmp_path / "b", None, 1, resources, Console(quiet=True))
    assert formats() == ["bitmill"] * 2
    assert not (tmp_path / "b").exists()


def test_every_format_says_what_its_runtime_does_with_activations():
    for kind in FORMATS.values():
        assert kind.activations
        assert callable(kind.load().check)
