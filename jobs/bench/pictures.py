"""The bench as pictures: bytes against gap with the front drawn, and what contrast does to the tokens' cosine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from jobs.bench.rows import WITH_CONTRAST, WITHOUT_CONTRAST
from jobs.bench.summary import Line, pareto_lines

SMALLEST_GAP = 1e-4  # nats; below it the scale is linear
MEASURES_OF_CONTRAST = {"token_cosine": "mean cosine between different tokens", "gap_nats": "gap to the teacher, nats"}
LABELS_BELOW = (18, 64, 36)  # points; neighbours differ
MARKERS = ("o", "s", "^", "D", "v", "P")


def front_figure(lines: Sequence[Line], title: str) -> Figure:
    """Draw every row at every width: honest bytes against gap, both logarithmic; the front is a line."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    widths = sorted({line.bits for line in lines})
    for marker, bits in zip(itertools.cycle(MARKERS), widths):
        shown = [line for line in lines if line.bits == bits]
        axes.scatter([x.packed_bytes for x in shown], [x.gap_nats for x in shown], marker=marker, label=bits)
    best = pareto_lines(lines)
    places = [(line.packed_bytes, line.gap_nats) for line in best]
    axes.plot(*zip(*places, strict=True), drawstyle="steps-post", color="black", linewidth=1, label="front")
    arrow = {"arrowstyle": "-", "linewidth": 0.5}
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "arrowprops": arrow}
    for below, line, place in zip(itertools.cycle(LABELS_BELOW), best, places):
        axes.annotate(line.row, place, xytext=(-6, -below), **style)
    axes.set_yscale("symlog", linthresh=SMALLEST_GAP)  # a student may be better than its teacher
    axes.set(xscale="log", xlabel="bytes of weights, everything counted", title=title)
    axes.set_ylabel(f"gap to the teacher: log(perplexity / teacher's), nats; linear below {SMALLEST_GAP:g}")
    axes.margins(x=0.22, y=0.12)  # room for the names
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(loc="lower left")
    return figure


def cosine_figure(lines: Sequence[Line], title: str) -> Figure:
    """Draw what the contrastive loss does at each width: mean cosine between the representations of different tokens,
    and the gap it costs or saves. Above a bar its difference from that without contrast, with the 95 % interval."""
    drawn = (WITHOUT_CONTRAST, *WITH_CONTRAST.values())
    names = [name for name in drawn if any(line.row == name for line in lines)]
    shown = {(line.row, line.bits): line for line in lines if line.row in names}
    widths = sorted({bits for _, bits in shown})
    figure = Figure(figsize=(4 + 3 * len(widths), 4.5), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), MEASURES_OF_CONTRAST.items(), strict=True):
        for number, name in enumerate(names):
            own = [(place, shown[name, bits]) for place, bits in enumerate(widths) if (name, bits) in shown]
            places = [place + 0.28 * (number - (len(names) - 1) / 2) for place, _ in own]
            axes.bar(places, [getattr(line, metric) for _, line in own], width=0.26, label=name)
            for place, (_, line) in zip(places, own, strict=True):
                change = str(line.less(WITHOUT_CONTRAST, metric) or "").replace(" [", "\n[").replace(" {", "\n{")
                axes.text(place, max(getattr(line, metric), 0), change, ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(widths)), widths)
        axes.margins(y=0.2)
        axes.set_ylabel(label)
    if names:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(f"{title}; above a bar: less that without contrast, with the 95 % interval", fontsize=10)
    return figure
