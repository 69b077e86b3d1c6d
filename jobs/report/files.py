"""The same beside the page: a picture of the trade-off and a table."""

from __future__ import annotations

import csv
import io
from typing import Any

from matplotlib.figure import Figure

from jobs.report.figures import FRONT, MUTED, PAPER, TEACHER, paper_marks, power
from jobs.report.values import Content, worker_hours
from pipeline.sweep.trials import LARGER_IS_BETTER

FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def picture(content: Content) -> bytes:
    """Bytes against the measure as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    best, measure = content.best, content.measure
    models = [one for one in content.shown if content.has(one, lambda one: one.packed_bytes)]
    axes.scatter([o.packed_bytes or 0 for o in models], [o.metrics[measure] for o in models], color=MUTED, zorder=2)
    places = [(float(one.packed_bytes or 0), one.metrics[measure]) for one in best]
    axes.plot([x for x, _ in places], [y for _, y in places], "o-", color=FRONT, drawstyle="steps-post", label="front")
    for one, place in zip(best, places, strict=True):
        text = one.label.replace("$", r"\$")
        axes.annotate(text, place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    if measure in content.teacher:
        teacher = (content.teacher_bytes, content.teacher[measure])
        axes.scatter(*teacher, marker="D", color=TEACHER, label="teacher, fp32")
    marks = paper_marks(content)
    if marks:
        places = [(mark.packed_bytes, mark.value) for mark in marks]
        axes.scatter(*zip(*places, strict=True), marker="x", color=PAPER, label="paper, relative to its teacher")
    direction = "higher" if measure in LARGER_IS_BETTER else "lower"
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda count, _: power(count))
    axes.set(xlabel="weights, scales included", ylabel=f"{measure} ({direction} is better)")
    axes.set_title(content.title.replace("$", r"\$"))
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def table(content: Content) -> str:
    """Every model as CSV: whole numbers, nothing rounded; text that a spreadsheet would run starts with a quote."""
    best = {one.key for one in content.best}
    knobs = list(dict.fromkeys(knob for one in content.shown for knob in one.recipe))
    file = io.StringIO()
    writer = csv.writer(file)
    fixed = ("key", "model", "bits", "status", "front", "packed_bytes", "ratio", "token_ms")
    writer.writerow(
        [*fixed, *content.metrics, *map(_plain, knobs), "worker_hours", "version", "package_uri", "failure"]
    )
    for one in content.shown:
        row = [one.key, one.label, one.bits, one.status, one.key in best, one.packed_bytes, one.ratio, one.token_ms]
        row += [one.metrics.get(name) for name in content.metrics]
        row += [one.recipe.get(knob) for knob in knobs]
        row += [worker_hours(one.costs), one.version, one.package_uri, one.failure]
        writer.writerow([_plain(value) for value in row])
    return file.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
