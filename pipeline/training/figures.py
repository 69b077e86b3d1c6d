"""How a student trained, as pictures: module scales and codes, weights against the grid, cosine between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.training.diagnostics import WIDEST

FACTS = {
    "gamma": "outermost level / mean |w|",
    "zeros": "share of zeros",
    "changed_per_100_steps": "codes changed per 100 steps",
}
MOST_HISTOGRAMS = 48


def module_curves(looks: Sequence[dict[str, Any]]) -> Figure:
    """Plot gamma, share of zeros and codes changed of every module over the steps; modules of a kind share a colour."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    modules = list(looks[-1]["modules"])
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    for axes, (fact, label) in zip(figure.subplots(1, len(FACTS)), FACTS.items(), strict=True):
        for module in modules:
            points = [(look["step"], look["modules"][module].get(fact, math.nan)) for look in looks]
            colour = f"C{kinds.index(module.rpartition('.')[2]) % 10}"
            axes.plot(*zip(*points, strict=True), linewidth=0.8, color=colour)
        axes.set(xlabel="step", title=label)
    handles = [Line2D([], [], color=f"C{index % 10}", label=kind) for index, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def cosine_curve(history: Sequence[dict[str, float]]) -> Figure:
    """Plot the mean cosine between the representations of different tokens over the steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = [(entry["step"], entry["token_cosine"]) for entry in history if "token_cosine" in entry]
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
    axes.set(xlabel="step", title="mean cosine between different tokens")
    return figure


def weight_histograms(histograms: dict[str, Any]) -> Figure:
    """Plot latent weights of each module in multiples of their mean magnitude, with the outermost levels as lines."""
    shown = list(histograms.items())[:MOST_HISTOGRAMS]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.8 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axes, (name, histogram) in zip(grid, shown, strict=False):
        edges = np.linspace(-WIDEST, WIDEST, len(histogram["counts"]) + 1)
        axes.stairs(histogram["counts"], edges, fill=True)
        for level in ("lowest_level", "highest_level"):
            axes.axvline(histogram[level], color="black", linewidth=0.8)
        axes.set_title(name, fontsize=6)
        axes.tick_params(labelsize=5)
    for axes in grid[len(shown) :]:
        axes.remove()
    return figure
