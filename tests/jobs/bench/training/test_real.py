"""`bench real` on a Llama of some thousand weights: what a row leaves, how it goes on, and what it imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jobs.bench.training import measures, real, shapes
from jobs.cli import app
from pipeline.models.build import build, read_config
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ROOT

LLAMA = {"architecture": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 300, "tie_word_embeddings": True}
ROW = "best, 4-4-8"


def bench(
    made: Path,
    out: Path,
    *arguments: str,
    budget: tuple[str, ...] = ("--minutes", "60", "--steps", "6"),  # which the steps end long before the minutes do
) -> Any:
    common = ("--model", str(made / "model"), "--batch", "4", "--micro-batch", "4", "--device", "cpu")
    return CliRunner().invoke(app, ["bench", "real", *common, *budget, "--out", str(out), "--json", *arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("made")
    documents = [f"{n} and {n + 1} are {2 * n + 1}, and {n} from {3 * n} leaves {2 * n}." for n in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    build(read_config({**LLAMA, **SIZES}), seed=0).save_pretrained(folder / "model")
    train_bpe(documents, 300).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def ran(made: Path) -> tuple[dict[str, Any], Path]:
    out = made / "bench"
    text = ("--text", str(made / "text.jsonl"), "--block-length", "16", "--only", ROW)
    shown = bench(made, out, *text, "--set", "distill.muon_lr=0.01")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.index(f"{ROW} ...") < shown.stderr.index(f"{ROW}: ")
    return json.loads(shown.stdout), out


def test_a_row_says_what_it_took_and_how_near_it_came(ran: Any) -> None:
    document, out = ran
    row, teacher = document["rows"][ROW], document["teacher"]
    assert (row["steps"], row["tokens"]) == (6, 6 * 4 * 16)
    assert teacher["steps"] == 6
    for split in real.SCORED:
        scores = row["scores"][split]
        assert scores["teacher"]["perplexity"] == pytest.approx(teacher["scores"][split]["perplexity"])
        assert scores["student"]["kl_nats"] > 0
        low, high = scores["gap_interval"]
        assert low <= scores["gap_nats"] <= high
    assert row["recipe"]["distill"]["muon_lr"] == 0.01
    assert row["recipe"]["distill"]["steps"] == row["steps"]
    assert 0 < row["packed_bytes"] < teacher["bytes"] / 4
    assert f"| {ROW} |" in (out / "real.md").read_text()


def test_what_has_a_result_is_not_run_again_and_what_was_stopped_goes_on(ran: Any, made: Path) -> None:
    document, out = ran
    (tokens,) = (out / "store" / "tokenize").iterdir()
    result = out / "best-4-4-8.json"
    result.unlink()  # as if it had been stopped while it was scored
    shown = bench(made, out, "--tokens", str(tokens), "--only", ROW, "--set", "distill.muon_lr=0.01")
    assert shown.exit_code == 0, shown.stderr
    again = json.loads(shown.stdout)
    assert again["teacher"] == document["teacher"]
    before, after = document["rows"][ROW], again["rows"][ROW]
    assert (after["resumed_at"], after["steps"]) == (before["steps"], before["steps"])
    assert after["scores"]["test"]["student"] == pytest.approx(before["scores"]["test"]["student"])


def test_a_folder_that_is_carried_away_in_mid_training_goes_on_where_it_comes_to(
    ran: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at a step after a checkpoint, and with nothing left where it was: it ends as one that was not stopped."""
    document, out = ran
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(out, here)
    for made_by_the_row in here.glob("best-4-4-8*"):
        made_by_the_row.unlink()
    shutil.rmtree(here / "store" / "distill")
    take = real.Trainer.train_step

    def stopped(trainer: real.Trainer, step: int) -> Any:
        if (trainer.job.steps, step) == (6, 4):
            raise InterruptedError
        return take(trainer, step)

    def given(out: Path) -> Any:
        (tokens,) = (out / "store" / "tokenize").iterdir()
        return bench(made, out, "--tokens", str(tokens), "--only", ROW, "--set", "distill.muon_lr=0.01")

    monkeypatch.setattr(real, "KEEP_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(real.Trainer, "train_step", stopped)
        assert given(here).exit_code == 1
    assert not (here / "best-4-4-8.json").exists()
    shutil.move(here, there)
    shown = given(there)
    assert shown.exit_code == 0, shown.stderr
    before, after = document["rows"][ROW], json.loads(shown.stdout)["rows"][ROW]
    assert before["resumed_at"] == 0 < after["resumed_at"] < before["steps"]
    for fact in ("steps", "best_step", "validations", "scores", "packed_bytes"):
        assert after[fact] == before[fact]


def test_a_row_for_which_no_time_is_left_waits_for_the_next_time(ran: Any, made: Path) -> None:
    _, out = ran
    (tokens,) = (out / "store" / "tokenize").iterdir()
    others = ("--only", ROW, "--only", "best, 2-2-8")
    shown = bench(made, out, "--tokens", str(tokens), *others, "--minutes", "0")
    assert shown.exit_code == 0, shown.stderr
    assert list(json.loads(shown.stdout)["rows"]) == [ROW]
    assert "best, 2-2-8: no time is left" in shown.stderr


def test_what_compilation_takes_comes_beside_the_minutes(
    ran: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes a second, and the first steps of a model an hour: a teacher's share of a minute
    would be 7 of these, and it gets as many as make it one."""
    _, out = ran
    (tokens,) = (out / "store" / "tokenize").iterdir()
    clock, take, warm = [0.0], real.Trainer.train_step, list[Any]()

    def taken(trainer: real.Trainer, step: int) -> Any:
        warm.append(trainer.model)
        clock[0] += 1.0 if sum(model is trainer.model for model in warm) > real.WARM_UP else 3600.0
        return take(trainer, step)

    monkeypatch.setattr(real.Trainer, "train_step", taken)
    told = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    for module in (real, measures):
        monkeypatch.setattr(module, "time", told)
    shown = bench(made, tmp_path, "--tokens", str(tokens), "--only", ROW, budget=("--minutes", "1"))
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    teacher, row = document["teacher"], document["rows"][ROW]
    assert teacher["steps"] == real.FINETUNE_LEAST
    assert row["steps"] == 60 - real.FINETUNE_LEAST
    assert (teacher["step_ms"], row["step_ms"]) == (1000, 1000)
    assert teacher["ready_s"] == row["ready_s"] == 3600 * real.WARM_UP + 1 + real.TIMED


def test_neither_ray_nor_mlflow_nor_boto3_is_needed(ran: Any, made: Path) -> None:
    _, out = ran
    (tokens,) = (out / "store" / "tokenize").iterdir()
    lacks = "import sys; sys.modules.update(dict.fromkeys(('ray', 'mlflow', 'boto3', 'matplotlib', 'optuna')));"
    arguments = ["bench", "real", "--model", str(made / "model"), "--tokens", str(tokens), "--steps", "2"]
    arguments += ["--batch", "4", "--only", "best, 2-2-8", "--device", "cpu", "--out", str(made / "bare")]
    code = f"{lacks} sys.argv[1:] = {arguments!r}; from jobs.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (made / "bare" / "best-2-2-8.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --tokens or --text"),
        (("--tokens", "nowhere"), "--tokens is 'nowhere', which is no finished step"),
        (("--tokens", "x", "--only", "worst"), "--only 'worst' is no row of this bench; valid: best, 2-2-8"),
        (("--tokens", "x", "--set", "distill.steps=3"), "--set 'distill.steps=3' has no effect here"),
        (("--tokens", "x", "--set", "quant.bits=2-2-8"), "it takes distill.KNOB=value"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...], said: str, made: Path, tmp_path: Path) -> None:
    shown = bench(made, tmp_path, *arguments)
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.split())


def test_shapes_are_of_what_a_device_trains_in_minutes_where_nothing_is_given() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert shapes.Extent.of(gpu, None, None, None) == shapes.Extent(16, 8, 512)
    assert shapes.Extent.of(cpu, None, None, None) == shapes.Extent(2, 1, 128)
    assert shapes.Extent.of(cpu, 6, 2, 16) == shapes.Extent(6, 2, 16)


def test_shapes_train_for_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "decoder": {"architecture": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 99},
        "both": {
            "architecture": "bart",
            "d_model": 32,
            "vocab_size": 99,
            **{f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")},
            **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
        },
    }
    monkeypatch.setattr(shapes, "MODELS", models)
    sizes = ("--batch", "4", "--micro-batch", "2", "--block-length", "64")
    arguments = ["bench", "real", "--shapes", *sizes, "--device", "cpu", "--out", str(tmp_path), "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document == json.loads((tmp_path / "shapes.json").read_text())
    assert document["extent"] == {"batch": 4, "micro_batch": 2, "length": 64}
    tokens = {name: row["tokens_per_s"] * row["ms"] / 1e3 for name, row in document["shapes"].items()}
    assert tokens == pytest.approx({"decoder": 4 * 64, "both": 4 * (64 + 8)})
    assert list(document["shapes"]) == list(models)
    for row in document["shapes"].values():
        assert len(row["losses"]) == shapes.STEPS
        assert all(loss == pytest.approx(4.6, abs=0.5) for loss in row["losses"])  # log 99, of random weights
