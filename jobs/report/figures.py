"""The interactive figures, as values that Plotly draws in the page."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from jobs.bench.paper import FULL, TABLE_1, TABLE_3, Cell
from jobs.report.values import Content, Costing, Mark, Shown
from pipeline.metrics import larger_is_better
from pipeline.retrain.decisions import Decision

INK, FRONT, MUTED, TEACHER, PAPER = "#1f2937", "#2563eb", "#94a3b8", "#b45309", "#7c3aed"
COLOURS = ("#2563eb", "#059669", "#d97706", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
SHORT = 24  # characters of a label beside its point
WIDE = 4.0  # ratio of the largest to the smallest value, above which the axis is logarithmic
# By measure: the paper's table, the column there, and what it was measured on. The first column has sizes in MiB.
PUBLISHED: dict[str, tuple[dict[tuple[str, str], tuple[Cell, ...]], int, str]] = {
    "perplexity": (TABLE_1, 1, "GPT-2, WikiText-2"),
    "accuracy": (TABLE_1, 4, "GPT-2, Persona-Chat"),
    "rougeL": (TABLE_3, 3, "BART, XSum"),
}


def paper_marks(content: Content) -> list[Mark]:
    """Return where the paper's students would be, in bytes and measure, if they stood to this teacher as to theirs."""
    if content.measure not in PUBLISHED or content.measure not in content.teacher_validation:
        return []
    table, column, data = PUBLISHED[content.measure]
    full = table[FULL, "32"]
    return [
        Mark(
            f"paper {bits} ({data})",
            content.teacher_bytes * cells[0].value / full[0].value,
            content.teacher_validation[content.measure] * cells[column].value / full[column].value,
        )
        for (method, bits), cells in table.items()
        if method == "quantgpt"
    ]


def trade_off(content: Content) -> dict[str, Any]:
    """Draw bytes against the measure on validation: models, the front, the teacher, the paper."""
    measure = content.measure
    figure = _models(content, lambda model: model.packed_bytes, content.best)
    if measure in content.teacher_validation:
        figure.add_scatter(
            x=[content.teacher_bytes],
            y=[content.teacher_validation[measure]],
            mode="markers",
            marker={"color": TEACHER, "size": 12, "symbol": "diamond"},
            name="teacher, fp32",
            text=[f"<b>teacher</b>, fp32<br>{size(content.teacher_bytes)}"],
            hovertemplate=f"%{{text}}<br>{measure} %{{y:.4g}}<extra></extra>",
        )
    if marks := paper_marks(content):
        figure.add_scatter(
            x=[mark.packed_bytes for mark in marks],
            y=[mark.value for mark in marks],
            mode="markers",
            marker={"color": PAPER, "size": 9, "symbol": "x-thin", "line": {"width": 2, "color": PAPER}},
            name="paper, relative to its teacher",
            text=[safe(mark.label) for mark in marks],
            hovertemplate="%{text}<br>as far from this teacher as from its own<extra></extra>",
        )
    ticks = [2**power for power in range(64)]
    figure.update_xaxes(
        title="bytes of weights, scales included", type="log", tickvals=ticks, ticktext=[*map(power, ticks)]
    )
    return _json(figure, 460)


def speed(content: Content) -> dict[str, Any] | None:
    """Draw milliseconds a token against the measure, if any were measured."""
    if not content.timed:
        return None
    figure = _models(content, lambda model: model.token_ms, content.pareto_front(lambda model: model.token_ms))
    figure.update_xaxes(title="milliseconds a token", rangemode="tozero")
    return _json(figure, 380)


def _models(content: Content, cost: Costing, best: Sequence[Shown]) -> go.Figure:
    """Draw the models at a cost and the measure, the front in these two, and the teacher's measure as a line."""
    line, measure = content.pareto_front(cost), content.measure
    figure = go.Figure()
    if len(line) > 1:
        figure.add_scatter(
            x=[cost(model) for model in line],
            y=[model.validation[measure] for model in line],
            mode="lines",
            line={"color": FRONT, "width": 2, "shape": "hv"},
            name="front",
            hoverinfo="skip",
        )
    measured = [model for model in content.shown if content.has(model, cost)]
    others = [model for model in measured if model not in best]
    for group, name, colour, width in ((others, "other models", MUTED, 9), (best, "on the front", FRONT, 12)):
        if group:
            figure.add_scatter(
                x=[cost(model) for model in group],
                y=[model.validation[measure] for model in group],
                mode="markers+text" if group is best else "markers",
                marker={"color": colour, "size": width},
                name=name,
                text=[safe(model.label if len(model.label) <= SHORT else model.bits) for model in group],
                textposition="top right",
                cliponaxis=False,
                hovertext=[hover(model, content) for model in group],
                hovertemplate="%{hovertext}<extra></extra>",
            )
    if measure in content.teacher_validation:
        figure.add_hline(content.teacher_validation[measure], line={"color": TEACHER, "width": 1, "dash": "dot"})
    figure.update_yaxes(title=axis(measure))
    values = [model.validation[measure] for model in measured]
    if min(values, default=0) > 0 and max(values) > WIDE * min(values):  # one bad trial must not flatten the rest
        figure.update_yaxes(type="log")
    return figure


def losses(content: Content) -> dict[str, Any]:
    """Draw training and validation losses of the students."""
    figure = go.Figure()
    for model, colour in zip(content.shown, itertools.cycle(COLOURS)):
        name, curve = safe(model.label), model.curve
        for points, dash, width, opacity in ((curve.train, "dot", 1, 0.45), (curve.validation, "solid", 2, 1.0)):
            if points:
                figure.add_scatter(
                    x=[step for step, _ in points],
                    y=[value if math.isfinite(value) else None for _, value in points],
                    mode="lines",
                    line={"color": colour, "width": width, "dash": dash},
                    opacity=opacity,
                    name=name,
                    legendgroup=model.key,
                    showlegend=dash == "solid",
                    hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4f}} nats<extra></extra>",
                )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats a token")
    return _json(figure, 420)


def history(decisions: Sequence[Decision]) -> dict[str, Any] | None:
    """Draw the measure of champion and challenger on the challenger's test rows, and its bytes, over the decisions, if
    more than one has them."""
    drawn = [decision for decision in decisions if decision.scores]
    if len(drawn) < 2:
        return None
    measure = drawn[-1].measure
    figure = go.Figure()
    days = [decision.at for decision in drawn]
    for outcome, colour in (("promoted", FRONT), ("rejected", MUTED)):
        chosen = [decision for decision in drawn if decision.decision == outcome]
        figure.add_scatter(
            x=[decision.at for decision in chosen],
            y=[decision.scores["challenger"].get(measure) for decision in chosen],
            mode="markers",
            marker={"color": colour, "size": 11},
            name=f"challenger, {outcome}",
            text=[f"<b>version {d.challenger}</b>, {d.decision}<br>{safe(d.reason)}" for d in chosen],
            hovertemplate=f"%{{text}}<br>{measure} %{{y:.4g}}<extra></extra>",
        )
    figure.add_scatter(
        x=days,
        y=[decision.scores.get("champion", decision.scores["challenger"]).get(measure) for decision in drawn],
        mode="lines+markers",
        line={"color": TEACHER, "width": 2, "shape": "hv"},
        name="the champion that it met",
        hovertemplate=f"{measure} %{{y:.4g}}<extra></extra>",
    )
    sizes = [decision.packed_bytes for decision in drawn]
    figure.add_scatter(
        x=days, y=sizes, mode="lines+markers", line={"color": PAPER, "width": 1}, name="bytes", yaxis="y2"
    )
    figure.update_yaxes(title=f"{measure} on test")
    figure.update_layout(
        yaxis={"domain": [0.42, 1]},
        yaxis2={"domain": [0, 0.3], "title": "bytes", "rangemode": "tozero", "anchor": "x"},
        xaxis={"anchor": "y2"},
    )
    return _json(figure, 480)


def bits_of_modules(model: Shown) -> dict[str, Any]:
    """Draw bits (bar length) and gamma of each module of one model."""
    names = [safe(module.name.removeprefix("transformer.").removeprefix("model.")) for module in model.modules]
    figure = go.Figure()
    texts = [
        f"{safe(m.name)}<br>{m.bits} bits, {m.weights:,} weights"
        + (f"<br>gamma {m.gamma:.3f}" if m.gamma is not None else "")
        + (f"<br>{m.zeros:.1%} zeros" if m.zeros is not None else "")
        for m in model.modules
    ]
    shared = {"y": names, "orientation": "h", "text": texts, "textposition": "none"}
    shared["hovertemplate"] = "%{text}<extra></extra>"
    figure.add_bar(x=[m.bits for m in model.modules], marker_color=FRONT, name="bits", xaxis="x", **shared)
    figure.add_bar(x=[m.gamma for m in model.modules], marker_color="#059669", name="gamma", xaxis="x2", **shared)
    figure.update_layout(
        xaxis={"domain": [0, 0.47], "title": "bits", "tickvals": [2, 4, 8, 32], "rangemode": "tozero"},
        xaxis2={"domain": [0.53, 1], "title": "gamma", "anchor": "y"},
        yaxis={"autorange": "reversed", "automargin": True},
        showlegend=False,
    )
    return _json(figure, 140 + 20 * len(names))


def hover(model: Shown, content: Content) -> str:
    """Return what a model is, in Plotly's few tags; everything from outside is escaped."""
    smaller = f", {model.ratio:.1f}x smaller" if model.ratio else ""
    lines = [f"<b>{safe(model.label)}</b>", size(model.packed_bytes) + smaller]
    if (took := model.latency) is not None:
        lines.append(f"{took.median_ms:.3g} ms a token ({took.least_ms:.3g}-{took.most_ms:.3g})")
    for split, metrics in (("validation", model.validation), ("test", model.metrics)):
        lines += [f"{split} {safe(name)} {value:.4g}" for name, value in metrics.items() if name in content.metrics]
    lines += [f"{safe(knob)}: {safe(value)}" for knob, value in model.recipe.items()]
    return "<br>".join(lines)


def axis(measure: str) -> str:
    """Return what stands beside the axis of the measure."""
    return f"{measure} on validation ({'higher' if larger_is_better(measure) else 'lower'} is better)"


def size(count: int | None) -> str:
    """Return bytes for people."""
    if count is None:
        return ""
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def power(count: float) -> str:
    """Return a power of two in bytes, as an axis shows it."""
    whole = max(1, int(count))
    unit = min((whole.bit_length() - 1) // 10, 3)
    return f"{whole >> (10 * unit)} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def safe(value: Any) -> str:
    """Return text that Plotly shows as it is, cut to what a label holds."""
    text = str(value)
    return html.escape(text if len(text) <= 120 else text[:117] + "...")


def _json(figure: go.Figure, height: int) -> dict[str, Any]:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="#f8fafc",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": -0.22, "x": 0},
        hoverlabel={"align": "left", "bgcolor": "white"},
        template="none",
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(automargin=True, gridcolor="#e2e8f0", zeroline=False)
    drawn: dict[str, Any] = figure.to_plotly_json()
    return drawn
