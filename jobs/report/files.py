"""The same beside the page: a picture of the trade-off and a table."""

from __future__ import annotations

import csv
import io
from typing import Any

from matplotlib.figure import Figure

from jobs.report.figures import FRONT, MUTED, PAPER, TEACHER, axis, paper_marks, power
from jobs.report.values import Content, worker_hours

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
