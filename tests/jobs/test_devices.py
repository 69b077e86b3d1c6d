"""Commands that run a model in torch do so on the GPU, where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import jobs.compress
import jobs.sweep
from jobs.bench.generated import generated_text
from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.flow import preflight
from tests.conftest import Ran
from tests.jobs.test_generate_and_pull import summarizer as summarizer
from tests.second_device import product_devices


def said(*arguments: Any) -> dict[str, Any]:
    shown = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert shown.exit_code == 0, shown.stderr
    document: dict[str, Any] = json.loads(shown.stdout)
    return document


def on_both(device: torch.device, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    """What some work gives where there is a GPU, which it has to use, and where there is none."""
    with product_devices() as used:
        there = work()
    assert used == {device.type}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with product_devices() as used:
        here = work()
    assert used == {"cpu"}
    return there, here


@pytest.mark.parametrize("packed", [True, False])
def test_evaluate(
    finished: Ran, checkpoint: Path, corpus: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    model = finished.package if packed else checkpoint
    there, here = on_both(device, monkeypatch, lambda: said("evaluate", model, "--data", corpus)["metrics"])
    assert there == pytest.approx(here, rel=1e-3)


def test_generate_where_it_runs_in_torch(
    checkpoint: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = on_both(
        device, monkeypatch, lambda: said("generate", checkpoint, "Bado", "--max-tokens", 6, "--temperature", 0)
    )
    assert there["text"] == here["text"]


def test_a_summary(summarizer: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = on_both(device, monkeypatch, lambda: said("generate", summarizer, "some words", "--max-tokens", 6))
    assert there["text"] == here["text"]


def test_the_text_of_a_bench(
    checkpoint: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def text() -> str:
        folder = tmp_path / "text"
        shutil.rmtree(folder, ignore_errors=True)
        return generated_text(checkpoint, 3, 8, 0, folder, lambda done, total: None).read_text()

    there, here = on_both(device, monkeypatch, text)
    assert len(there.splitlines()) == len(here.splitlines())


@pytest.mark.parametrize("command", ["compress", "sweep"])
def test_what_is_odd_about_a_machine_is_said_in_the_plan_and_at_the_start(
    command: str, tiny_fields: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: Any) -> None:
        raise ConfigError("It has begun.")

    for module, name in ((jobs.compress, "run_plan"), (jobs.sweep, "run_sweep")):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(preflight, "this_device", lambda: torch.device("cuda", 0))
    path = tmp_path / "run.yaml"
    sweep = {"sweep": {"space": {"quant.bits": ["2-2-8", "4-4-8"]}}} if command == "sweep" else {}
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path, **sweep)))
    assert [warning.split(",")[0] for warning in said(command, path, "--plan")["warnings"]] == [
        "This machine has a GPU"
    ]
    for more, end in ((["--plan"], "worker-hours" if sweep else "cache mode"), ([], "It has begun.")):
        shown = " ".join(CliRunner().invoke(app, [command, str(path), *more]).stderr.split())
        assert "Set resources.gpus_per_worker: 1 to use it." in shown
        assert end in shown


def test_a_sweep_warns_of_its_trials_too(
    tiny_fields: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "emulates_bf16", lambda: True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_fields(tmp_path, sweep={"space": {"distill.precision": ["fp32", "bf16"]}})))
    (warning,) = said("sweep", path, "--plan")["warnings"]
    assert warning.startswith("distill.precision is bf16")
