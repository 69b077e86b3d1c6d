"""What `bitmill inspect` tells of a model, and that it starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.models.build import build, read_config
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ARCHITECTURES

WEIGHTS = "model.safetensors"
Inspect = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A Llama whose table has 20 rows more than its tokenizer has tokens."""
    words = train_bpe([corpus.read_text()], 300)
    build(read_config(ARCHITECTURES["llama"], vocab_size=320), seed=0).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    def run(*arguments: Any, status: int = 0) -> Any:
        options = ("--json", "--storage-uri", str(tmp_path / "store"))
        shown = CliRunner().invoke(app, ["inspect", *map(str, arguments), *options])
        assert shown.exit_code == status, shown.stderr
        return json.loads(shown.stdout) if status == 0 else " ".join(shown.stderr.split())

    return run


def test_matrices_sizes_and_runtimes_are_told(inspect: Inspect, folder: Path) -> None:
    told = inspect(folder)
    assert (told["model_type"], told["family"]) == ("llama", "llama")
    matrices = {entry["name"]: (entry["count"], entry["rows"], entry["columns"]) for entry in told["matrices"]}
    assert matrices["model.embed_tokens"] == matrices["lm_head"] == (1, 320, 32)
    assert matrices["model.layers.*.mlp.down_proj"] == (2, 32, 48)
    weights = sum(count * rows * columns for count, rows, columns in matrices.values())
    assert told["parameters"] == weights + 5 * 32  # norms
    assert 4 * told["parameters"] == told["fp32_bytes"] < (folder / WEIGHTS).stat().st_size
    for bits in (2, 4, 8):
        assert weights * bits / 8 < told["packed_bytes"][f"{bits}-{bits}-8"] < weights * bits / 8 + 12_000
    assert told["takes"] == dict.fromkeys(("packed runtime", "transformers", "onnx", "gguf", "compressed-tensors"), "")
    assert told["groups"] == []  # rows of 48
    assert told["unusual"] == ["20 of the vocabulary's 320 rows are padding: the tokenizer has 300 tokens."]


def test_what_is_unusual_is_named_and_nothing_of_it_is_an_error(inspect: Inspect, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"][300:] = 0
    tensors["model.embed_tokens.weight"][1, 1] = 9.0
    tensors["model.layers.1.mlp.up_proj.weight"][1, :2] = float("nan")
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    dropped, padding, *of_tensors = inspect(folder)["unusual"]
    assert dropped.startswith("1 tensors are not of the model that config.json describes: model.layers.1.mlp.up_proj.b")
    assert padding.startswith("20 of the vocabulary's 320 rows are padding")
    dead, outlier, broken = sorted(of_tensors, key=lambda line: ("zeros" not in line, "largest" not in line))
    assert dead == "model.embed_tokens.weight: 20 of 320 rows are zeros alone."
    root = tensors["model.embed_tokens.weight"].square().mean().sqrt()
    assert outlier.startswith(f"model.embed_tokens.weight: its largest weight is {9 / root:.0f} times the root of the")
    assert broken == "model.layers.1.mlp.up_proj.weight holds 2 NaN and 0 infinite: `compress` refuses it."


def test_a_runtime_that_does_not_take_the_model_says_why(inspect: Inspect, folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    stablelm = read_config({**ARCHITECTURES["llama"], "architecture": "stablelm"}, vocab_size=320)
    build(stablelm, seed=0).save_pretrained(folder)
    told = inspect(folder, "--family", "llama")
    assert (told["model_type"], told["family"], told["takes"]["transformers"]) == ("stablelm", "llama", "")
    assert "a stablelm model has no graph" in told["takes"]["packed runtime"]
    assert "not stablelm" in told["takes"]["gguf"]
    assert told["unusual"][0].startswith("Set model.tokenizer, for there is none beside the model")
    walked = inspect(folder)
    assert (walked["family"], walked["matrices"]) == ("walked", told["matrices"])
    assert (
        "by a walk over them: quantized are lm_head, model.embed_tokens, model.layers.*.mlp.d" in walked["unusual"][0]
    )


def test_a_model_that_cannot_be_a_teacher_is_refused(inspect: Inspect, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "MODEL: " in (message := inspect(folder, status=2))
    assert "PEFT adapter of 'org/base'" in message


def test_people_read_a_table_and_nothing_is_started(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from jobs.cli import app; "
        f"shown = CliRunner().invoke(app, ['inspect', {str(folder)!r}, '--storage-uri', {str(tmp_path / 'store')!r}]); "
        "print(shown.stderr, shown.exit_code, sorted({'ray', 'mlflow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path.cwd())
    assert "model.layers.*.self_attn.q_proj" in done.stdout, done.stderr
    assert "gguf: yes" in done.stdout
    assert "per_group, wherever it is taken: none, for the rows of all are no whole groups" in done.stdout
    assert done.stdout.rstrip().endswith("0 []")
