"""Figures draw whatever a run saw, and a registered run has them beside its curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from torch import nn

from pipeline.quant.modules import InputQuantizer, QuantizedLinear
from pipeline.store.locations import tracking_uri
from pipeline.tracking import runs
from pipeline.training import figures
from pipeline.training.diagnostics import Watch, weight_histograms
from tests.conftest import Ran
from tests.quant.cases import make

PNG = b"\x89PNG\r\n\x1a\n"


def drawn(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=30)
    assert path.read_bytes().startswith(PNG)


def seen(quantizer: str, modules: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two looks at some matrices found."""
    matrices, watch = nn.ModuleDict(), Watch()
    for number in range(modules):
        weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        made = make(quantizer, weight)
        matrices[f"kind{number % 13}-{number}"] = QuantizedLinear(weight, None, made, InputQuantizer(32, True, "token"))
    looks = [{"step": step, "modules": watch.look(matrices, step)} for step in (0, 10)]
    return looks, weight_histograms(matrices)


@pytest.mark.parametrize(("quantizer", "modules"), [("quantgpt", 1), ("twn", 1), ("statistics", 7), ("seq", 2)])
def test_curves_and_histograms_draw(quantizer: str, modules: int, tmp_path: Path) -> None:
    looks, histograms = seen(quantizer, modules)
    curves = figures.module_curves(looks)
    gamma, zeros, changed = curves.axes
    assert [len(axes.lines) for axes in curves.axes] == [modules] * 3
    for number, look in enumerate(looks):
        values = [line.get_ydata()[number] for line in gamma.lines]
        assert values == pytest.approx([facts["gamma"] for facts in look["modules"].values()])
    assert [list(line.get_xdata()) for line in zeros.lines] == [[0, 10]] * modules
    assert all(line.get_ydata()[0] != line.get_ydata()[0] for line in changed.lines)  # NaN at the first look
    drawn(curves, tmp_path / "curves.png")
    shown = figures.weight_histograms(histograms)
    assert [axes.get_title() for axes in shown.axes] == list(histograms)
    drawn(shown, tmp_path / "weights.png")


def test_more_modules_than_fit_are_left_out() -> None:
    looks, histograms = seen("quantgpt", 50)
    assert len(figures.weight_histograms(histograms).axes) == figures.MOST_HISTOGRAMS == 48
    curves = figures.module_curves(looks)
    assert [len(axes.lines) for axes in curves.axes] == [50] * 3


def test_one_look_draws(tmp_path: Path) -> None:
    looks, _ = seen("quantgpt", 3)
    drawn(figures.module_curves(looks[:1]), tmp_path / "curves.png")


@pytest.mark.parametrize("steps", [[0], [0, 5, 10]])
def test_the_cosine_is_drawn_where_it_was_measured(steps: list[int], tmp_path: Path) -> None:
    history: list[dict[str, float]] = [{"step": step, "token_cosine": step / 10} for step in steps]
    figure = figures.cosine_curve([{"step": 3, "loss": 1.0}, *history])
    (line,) = figure.axes[0].lines
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(step, step / 10) for step in steps]
    drawn(figure, tmp_path / "cosine.png")


def client_of(ran: Ran) -> MlflowClient:
    return runs.connect(tracking_uri(ran.plan.config.resources))


def test_a_registered_run_has_its_pictures_and_the_curve_of_every_module(finished: Ran) -> None:
    client, run_id = client_of(finished), finished.record("register").run_id
    files = [file for file in client.list_artifacts(run_id, "pictures") if not file.is_dir]
    assert sorted(file.path for file in files) == [
        "pictures/modules.png",
        "pictures/token_cosine.png",
        "pictures/weights.png",
    ]
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    folder = Path(experiment.artifact_location.removeprefix("file://")) / run_id / "artifacts"
    for file in files:
        content = (folder / file.path).read_bytes()
        assert content.startswith(PNG)
        assert len(content) == file.file_size > 2000
    looks = json.loads((finished.folder("distill") / "modules.json").read_text())
    modules = list(looks[0]["modules"])
    for module in (modules[0], modules[-1]):
        for fact in ("gamma", "zeros", "changed_per_100_steps"):
            expected = [
                (look["step"], look["modules"][module][fact]) for look in looks if fact in look["modules"][module]
            ]
            history = client.get_metric_history(run_id, f"modules/{module}/{fact}")
            points = sorted((point.step, point.value) for point in history)
            assert [step for step, _ in points] == [step for step, _ in expected]
            assert [value for _, value in points] == pytest.approx([value for _, value in expected])
    metrics = client.get_run(run_id).data.metrics
    assert {f"modules/{module}/gamma" for module in modules} <= metrics.keys()
    cosines = client.get_metric_history(run_id, "distill/token_cosine")
    assert sorted(point.step for point in cosines) == [0, 5, 10, 12]


def test_runs_with_little_to_show_are_registered(
    tiny_config: Callable[..., Any], run_flow: Callable[..., Ran], cloned: Path
) -> None:
    """Without quantized modules, and without a step."""
    runs: dict[str, dict[str, Any]] = {
        "2": {"quant": {"bits": "32-32-32"}, "distill": {"steps": 2}},
        "0": {"distill": {"steps": 0}},
    }
    found = {}
    for steps, overrides in runs.items():
        ran = run_flow(tiny_config(cloned, **overrides))
        client, run_id = client_of(ran), ran.record("register").run_id
        files = {file.path.removeprefix("pictures/") for file in client.list_artifacts(run_id, "pictures")}
        assert "token_cosine.png" in files
        assert ("weights.png" in files) == (steps == "0")
        found[steps] = client.get_run(run_id).data.params["steps"]
    assert found == {steps: steps for steps in runs}
