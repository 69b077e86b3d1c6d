"""The same beside the page: a picture of the trade-off and a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from matplotlib.figure import Figure

from jobs.report.figures import FRONT, MUTED, PAPER, TEACHER, axis, paper_marks, power, size
from jobs.report.values import Content, worker_hours
from pipeline.retrain.decisions import Decision

FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def picture(content: Content) -> bytes:
    """Draw bytes against the measure on validation as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    best, measure = content.best, content.measure
    models = [model for model in content.shown if content.has(model, lambda model: model.packed_bytes)]
    axes.scatter([m.packed_bytes or 0 for m in models], [m.validation[measure] for m in models], color=MUTED, zorder=2)
    places = [(float(model.packed_bytes or 0), model.validation[measure]) for model in best]
    axes.plot([x for x, _ in places], [y for _, y in places], "o-", color=FRONT, drawstyle="steps-post", label="front")
    for model, place in zip(best, places, strict=True):
        text = model.label.replace("$", r"\$")
        axes.annotate(text, place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    if measure in content.teacher_validation:
        place = (content.teacher_bytes, content.teacher_validation[measure])
        axes.scatter(*place, marker="D", color=TEACHER, label="teacher, fp32")
    if marks := paper_marks(content):
        places = [(mark.packed_bytes, mark.value) for mark in marks]
        axes.scatter(*zip(*places, strict=True), marker="x", color=PAPER, label="paper, relative to its teacher")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda count, _: power(count))
    axes.set(xlabel="weights, scales included", ylabel=axis(measure))
    axes.set_title(content.title.replace("$", r"\$"))
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def history_picture(name: str, decisions: Sequence[Decision]) -> bytes:
    """Draw what was decided on a name as a PNG: the measure of challenger and champion on test, and bytes, over
    time."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    drawn = [decision for decision in decisions if decision.scores]
    days = [datetime.fromisoformat(decision.at) for decision in drawn]
    measure = drawn[-1].measure if drawn else ""
    theirs = [decision.scores.get("champion", decision.scores["challenger"])[measure] for decision in drawn]
    above.plot(days, theirs, "o-", color=TEACHER, drawstyle="steps-post", label="the champion that it met")
    for outcome, colour in (("promoted", FRONT), ("rejected", MUTED)):
        chosen = [(day, d) for day, d in zip(days, drawn, strict=True) if d.decision == outcome]
        scores = [decision.scores["challenger"][measure] for _, decision in chosen]
        above.scatter([day for day, _ in chosen], scores, color=colour, zorder=3, label=f"challenger, {outcome}")
    below.plot(days, [decision.packed_bytes for decision in drawn], "o-", color=PAPER)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(lambda count, _: size(int(count)))
    above.set(ylabel=f"{measure} on test")
    above.set_title(name.replace("$", r"\$"))
    above.legend(fontsize=8)
    figure.autofmt_xdate()
    for axes in (above, below):
        axes.grid(visible=True, linewidth=0.3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def table(content: Content) -> str:
    """Return all models as CSV, scores being of the test split unless they say validation: numbers are not rounded;
    text that a spreadsheet would run starts with a quote."""
    best = {model.key for model in content.best}
    knobs = list(dict.fromkeys(knob for model in content.shown for knob in model.recipe))
    file = io.StringIO()
    writer = csv.writer(file)
    head = ("key", "model", "bits", "status", "front", "packed_bytes", "ratio", "token_ms")
    validated = [f"validation_{name}" for name in content.metrics]
    ends = ("worker_hours", "version", "package_uri", "failure")
    writer.writerow([*head, *content.metrics, *validated, *map(_plain, knobs), *ends])
    for model in content.shown:
        row: list[Any] = [model.key, model.label, model.bits, model.status, model.key in best]
        row += [model.packed_bytes, model.ratio, model.token_ms]
        row += [metrics.get(name) for metrics in (model.metrics, model.validation) for name in content.metrics]
        row += [model.recipe.get(knob) for knob in knobs]
        row += [worker_hours(model.costs), model.version, model.package_uri, model.failure]
        writer.writerow([_plain(value) for value in row])
    return file.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
