"""The bench as pictures: bytes against gap with the front drawn, and what contrast does to the tokens' cosine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jobs.bench.rows import PAPER
from jobs.bench.summary import Line, front

SMALLEST_GAP = 1e-4  # nats; below it the scale is linear
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_front(lines: Sequence[Line], title: str, path: Path) -> None:
    front_figure(lines, title).savefig(path, dpi=130)


def front_figure(lines: Sequence[Line], title: str) -> Figure:
    """Every row at every width: honest bytes against gap, both logarithmic; the front is a line."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    widths = sorted({line.bits for line in lines})
    for marker, bits in zip(itertools.cycle(MARKERS), widths):
        shown = [line for line in lines if line.bits == bits]
        axes.scatter([x.packed_bytes for x in shown], [x.gap_nats for x in shown], marker=marker, label=bits)
    best = front(lines)
    axes.plot([x.packed_bytes for x in best], [x.gap_nats for x in best], color="black", linewidth=1, label="front")
    for line in best:
        place = (line.packed_bytes, line.gap_nats)
        axes.annotate(line.row, place, xytext=(5, -11), textcoords="offset points", fontsize=8)
    axes.set_yscale("symlog", linthresh=SMALLEST_GAP)  # a student may be better than its teacher
    axes.set(xscale="log", xlabel="bytes of weights, everything counted", title=title)
    axes.set_ylabel("gap to the teacher: log(perplexity / teacher's), nats")
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()
    return figure


def draw_cosines(lines: Sequence[Line], title: str, path: Path) -> None:
    """Mean cosine between the representations of different tokens, with the contrastive loss and without."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shown = [line for line in lines if line.row in (PAPER, f"{PAPER} without contrast")]
    axes.bar([f"{line.row}\n{line.bits}" for line in shown], [line.token_cosine for line in shown], width=0.5)
    axes.set(ylabel="mean cosine between different tokens", title=title)
    figure.savefig(path, dpi=130)
