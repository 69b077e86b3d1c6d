"""What is kept and what is not: measured differences, reasons, deleted files, verdicts in MLflow."""

import json
import math
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import export
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, RunError
from pipeline.export import FORMATS, dequantized, format_named, gguf
from pipeline.export.probes import Probes, make_probes
from pipeline.export.verify import Comparison, Measured, floors_as_it_runs, measure, reasons_against
from pipeline.package.package import load, load_in_fp32
from pipeline.store.locations import tracking_uri
from pipeline.tracking import registry, runs
from tests.family_models import DECODERS, ENCODER_DECODERS

CLOSE = Comparison(kl_nats=1e-5, agreement=0.999, perplexity=10.0, perplexity_change=1e-4)
ROUNDED = Comparison(kl_nats=2e-3, agreement=0.96, perplexity=10.0, perplexity_change=1e-4)


def bitmill(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("exact", "as_it_runs", "error", "reason"),
    [
        ({}, {}, None, None),
        ({"kl_nats": 9.9e-4, "agreement": 0.9901, "perplexity_change": -4.9e-3}, {"kl_nats": 2.9e-3}, 2.0**-11, None),
        ({"kl_nats": 1.1e-3}, {}, None, r"under fp32 activations KL.* is 0\.0011 nats a token, more than 0\.001$"),
        ({"agreement": 0.989}, {}, None, r"under fp32 .* same at 98\.90% of the steps, of 99% due"),
        ({"perplexity_change": 0.006}, {}, None, r"under fp32 .* perplexity differs by \+0\.60%, more than 0\.5%"),
        ({"perplexity_change": -0.006}, {}, None, r"perplexity differs by -0\.60%"),
        ({}, {"kl_nats": 3.1e-3}, None, r"as it runs KL.* is 0\.0031 nats a token, more than 0\.003$"),
        ({}, {"agreement": 0.899}, None, r"as it runs .* same at 89\.90% of the steps, of 90% due"),
        ({}, {"perplexity_change": -0.0105}, None, r"as it runs perplexity differs by -1\.05%, more than 1\.0%"),
        ({"kl_nats": math.nan}, {}, None, "under fp32 activations the runtime gives numbers that are not finite"),
        ({}, {"perplexity_change": math.inf}, None, "as it runs the runtime gives numbers that are not finite"),
        ({}, {}, 0.01, "reads back 0.01 off its levels"),
        ({}, {}, math.nan, "reads back nan off"),
    ],
)
def test_each_floor_is_missed_alone_and_said_with_its_numbers(exact, as_it_runs, error, reason):
    """The package's own rounding costs 2e-3 nats, which is what the runtime's may; by chance that makes 0.5 % and 3
    sqrt(2 * 2e-3 / 1580) of a perplexity."""
    measured = Measured(
        prompts=20,
        steps=1580,
        whole_steps=1580,
        exact=CLOSE.model_copy(update=exact),
        rounding=ROUNDED,
        as_it_runs=ROUNDED.model_copy(update=as_it_runs),
        as_it_runs_floors=floors_as_it_runs(ROUNDED, 1580),
        as_scored=ROUNDED,
    )
    reasons = reasons_against(measured, error)
    if reason is None:
        assert reasons == ()
    else:
        assert len(reasons) == 1
        assert re.search(reason, reasons[0])


def test_what_a_package_rounds_away_allows_an_export_no_more_than_a_hundredth():
    floors = floors_as_it_runs(ROUNDED.model_copy(update={"kl_nats": 0.058}), 160)
    assert floors.missed_by(ROUNDED.model_copy(update={"kl_nats": 0.0109})) == []
    assert floors.missed_by(ROUNDED.model_copy(update={"kl_nats": 0.0111}))


def test_what_a_perplexity_may_differ_by_is_what_chance_makes_of_a_rounding_in_so_few_tokens():
    """Of distributions that are some noise apart, over tokens drawn from one of them."""
    random, tokens, words = np.random.default_rng(0), 160, 200
    logits = random.standard_normal((tokens, words))
    apart = logits + 0.14 * random.standard_normal((tokens, words))
    ours, theirs = (each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in (logits, apart))
    kl = float((np.exp(ours) * (ours - theirs)).sum(axis=1).mean())
    allowed = floors_as_it_runs(ROUNDED.model_copy(update={"kl_nats": kl}), tokens).max_perplexity_change
    drawn = [np.array([random.choice(words, p=np.exp(row)) for row in ours]) for _ in range(60)]
    changes = [np.expm1((ours - theirs)[np.arange(tokens), chosen].mean()) for chosen in drawn]
    assert 0.005 < kl < 0.01
    assert 0.25 < np.std(changes) / (allowed - 0.005) < 0.42


def noise(shape, size):
    return size * np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("family", ["m2m_100", "opt"])
def test_no_probe_holds_padding_which_is_no_text(family):
    """transformers gives it no position in M2M100, and gives those after it others."""
    kind = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    shape = {**DECODERS, **ENCODER_DECODERS}[family]
    model = kind.from_config(AutoConfig.for_model(family, **shape, vocab_size=12, pad_token_id=1)).eval()
    probes = make_probes(model, None)
    given = torch.cat([probes.rows.flatten(), *([] if probes.sources is None else [probes.sources.flatten()])])
    assert set(given.tolist()) == {*range(12)} - {1}


@pytest.mark.parametrize("every", [1, 3])
def test_a_runtime_is_measured_against_independent_arithmetic(finished, every):
    """A runtime that shifts every logit and adds noise: the shift does not count, the noise does. Where it does not
    tell whole distributions nothing but its highest logit counts."""
    scored, exact = load(finished.package), load_in_fp32(finished.package)
    probes = make_probes(scored, None)
    assert probes.rows.shape == (20, 32)
    probes = Probes(probes.rows[:2])

    @torch.no_grad()
    def noisy(ids):
        logits = exact(torch.tensor([ids])).logits[0].numpy() + 3.0
        logits += noise(logits.shape, 0.1)
        likeliest = np.where(logits == logits.max(axis=1, keepdims=True), logits, -np.inf)
        return np.where(whole[:, None], logits, likeliest)

    whole = np.arange(31) % every == 0
    measured = measure(exact, scored, noisy, None, probes, None if every == 1 else whole)
    with torch.no_grad():
        logits = exact(probes.rows[:, :-1]).logits.double()
        packed = torch.log_softmax(scored(probes.rows[:, :-1]).logits.double(), -1)
    ours = torch.log_softmax(logits, -1)
    theirs = torch.log_softmax(logits + torch.from_numpy(noise(logits.shape[1:], 0.1)), -1)
    labels = probes.rows[:, 1:, None]
    assert (measured.steps, measured.whole_steps) == (62, 2 * int(whole.sum()))
    for found, reference, model in (
        (measured.exact, ours, theirs),
        (measured.rounding, ours, packed),
        (measured.as_scored, packed, theirs),
    ):
        kl = torch.nn.functional.kl_div(model, reference, log_target=True, reduction="none").sum(-1)[:, whole].mean()
        assert found.kl_nats == pytest.approx(float(kl), rel=1e-4)
        assert found.agreement == pytest.approx(float((reference.argmax(-1) == model.argmax(-1)).double().mean()))
        perplexities = [float(torch.exp(-each.gather(-1, labels)[:, whole].mean())) for each in (reference, model)]
        assert found.perplexity == pytest.approx(perplexities[1], rel=1e-6)
        assert found.perplexity_change == pytest.approx(perplexities[1] / perplexities[0] - 1, rel=1e-3)
    assert measured.as_it_runs is None


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("transformers", 0.06, r"under fp32 activations KL.* 0\.0016\d* nats"),
        ("onnx", 0.1, r"as it runs KL.* 0\.004\d+ nats"),
    ],
)
def test_noise_of_a_tenth_of_a_logit_is_refused(trained, tmp_path, monkeypatch, name, size, reason):
    """It makes another token likeliest at one step of twelve; in ONNX Runtime only the kernels of 8 bits have it."""
    module = format_named(name).load()
    honest = module.open_logits

    def open_noisily(out, threads, **exactly):
        logits = honest(out, threads, **exactly)
        return logits if exactly else lambda *ids: logits(*ids) + noise((len(ids[0]), 300), size)

    monkeypatch.setattr(module, "open_logits", open_noisily)
    with pytest.raises(RunError, match=f"was deleted: {reason} a token"):
        export(str(trained("gpt2")), name, tmp_path / "out", None, 1, Resources(), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_an_export_that_computes_otherwise_is_deleted_and_the_reasons_are_said(trained, tmp_path, monkeypatch):
    honest = gguf.pack_blocks
    monkeypatch.setattr(gguf, "pack_blocks", lambda codes, scale, *rest: honest(codes, scale * 1.05, *rest))
    done = bitmill("export", trained("gpt2"), "--format", "gguf", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert re.search(r"was deleted: under fp32 activations KL.* a tensor reads back 0\.05 off its levels", done.stderr)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_before_anything_is_written(trained, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for model, name, out, message in (
        (trained("gpt2"), "compressed-tensors", "out", "qwen2, qwen3 models, not gpt2"),
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


def test_a_text_may_be_the_probe_and_a_short_one_is_refused(trained, corpus, tmp_path):
    done = bitmill(
        "export", trained("gpt2"), "--format", "transformers", "--out", tmp_path / "a", "--data", corpus, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["probe"] == str(corpus)
    for line in ("write: started", "prompts: done in", "verify: 5/20", "verify: 20/20"):
        assert line in done.stderr
    short = tmp_path / "short.txt"
    short.write_text("Too little.")
    with pytest.raises(ConfigError, match="fills 0 rows of 80 tokens; 20 are needed"):
        export(str(trained("gpt2")), "transformers", tmp_path / "b", str(short), 1, Resources(), Console(quiet=True))


def test_verdicts_of_a_registered_model_are_kept_with_it(tiny_config, trained, run_flow, tmp_path, monkeypatch):
    """Formats that passed are a tag of the version and its logged model; one that fails later leaves the list."""
    root = trained("gpt2").parents[4]
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


def test_what_ran_is_said_with_its_version_and_what_did_not():
    ran = {name: kind.ran() for name, kind in FORMATS.items()}
    installed = {package: version(package) for package in ("transformers", "compressed-tensors", "onnxruntime")}
    assert ran["transformers"] == f"transformers {installed['transformers']}"
    assert ran["onnx"] == f"onnxruntime {installed['onnxruntime']}"
    assert ran["compressed-tensors"] == (
        f"transformers {installed['transformers']} and compressed-tensors {installed['compressed-tensors']}; "
        "vLLM was not run"
    )
