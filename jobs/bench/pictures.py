"""The bench as pictures: bytes against gap with the front drawn, and what contrast does to the tokens' cosine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jobs.bench.rows import PAPER, WITHOUT_CONTRAST
from jobs.bench.summary import Line, front

SMALLEST_GAP = 1e-4  # nats; below it the scale is linear
MEASURES_OF_CONTRAST = {"token_cosine": "mean cosine between different tokens", "gap_nats": "gap to the teacher, nats"}
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
    axes.plot(
        [x.packed_bytes for x in best],
        [x.gap_nats for x in best],
        drawstyle="steps-post",
        color="black",
        linewidth=1,
        label="front",
    )
    for number, line in enumerate(best):
        axes.annotate(
            line.row,
            (line.packed_bytes, line.gap_nats),
            textcoords="offset points",
            xytext=(-6, -34 if number % 2 else -18),
            ha="right",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5},
        )
    axes.set_yscale("symlog", linthresh=SMALLEST_GAP)  # a student may be better than its teacher
    axes.set(xscale="log", xlabel="bytes of weights, everything counted", title=title)
    axes.set_ylabel("gap to the teacher: log(perplexity / teacher's), nats")
    axes.margins(0.12)  # room for the names
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()
    return figure


def draw_cosines(lines: Sequence[Line], title: str, path: Path) -> None:
    """What the contrastive loss does at each width: mean cosine between the representations of different tokens, and
    the gap it costs or saves. Above each pair what leaving it out changes, with the 95 % interval."""
    shown = {name: {x.bits: x for x in lines if x.row == name} for name in (PAPER, WITHOUT_CONTRAST)}
    widths = [bits for bits in sorted(shown[PAPER]) if bits in shown[WITHOUT_CONTRAST]]
    figure = Figure(figsize=(4 + 2.2 * len(widths), 4.5), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), MEASURES_OF_CONTRAST.items(), strict=True):
        for offset, name in ((-0.2, PAPER), (0.2, WITHOUT_CONTRAST)):
            values = [getattr(shown[name][bits], metric) for bits in widths]
            axes.bar([place + offset for place in range(len(widths))], values, width=0.38, label=name)
        for place, bits in enumerate(widths):
            top = max(getattr(rows[bits], metric) for rows in shown.values())
            change = str(shown[WITHOUT_CONTRAST][bits].less(PAPER, metric) or "").replace(" [", "\n[")
            axes.text(place, max(top, 0), change, ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(widths)), widths)
        axes.margins(y=0.15)
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
