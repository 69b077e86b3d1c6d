"""The page: one HTML file that needs nothing else. Names and values are data to it, never markup or script."""

from __future__ import annotations

import base64
import gzip
import math
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jobs.report import figures
from jobs.report.files import picture
from jobs.report.values import Content, Cost, Shown, worker_hours
from pipeline.metrics import printed

SUITE_TABLES = {"position": "tokens behind the prompt", "frequency": "how common a token is in the training text"}
TEXT_COLUMNS = ("model", "bits", "status", "version")


def page(content: Content) -> str:
    """Render the whole HTML."""
    folder = resources.files("jobs.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    drawn = {
        "trade_off": figures.trade_off(content),
        "speed": figures.speed(content),
        "losses": figures.losses(content),
        "history": figures.history(content.decisions),
        "modules": [figures.bits_of_modules(model) for model in with_modules(content)],
    }
    return template.render(
        content=content,
        headline=headline(content),
        cards=cards(content),
        columns=columns(content),
        text_columns=TEXT_COLUMNS,
        rows=[row(model, content) for model in content.shown],
        costs=cost_lines(content),
        figures=drawn,
        marks=figures.paper_marks(content),
        with_modules=with_modules(content),
        machines=", ".join(sorted({model.latency.machine for model in content.shown if model.latency is not None})),
        picture=base64.b64encode(picture(content)).decode(),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        size=figures.size,
        measured=measured,
        printed=printed,
        titles=SUITE_TABLES,
    )


def with_modules(content: Content) -> list[Shown]:
    """Return the models whose modules are known, those of the front first."""
    best = content.best
    return [model for model in [*best, *(other for other in content.shown if other not in best)] if model.modules]


def headline(content: Content) -> str:
    """Return the line under the title: parameters, models finished, models on the front."""
    parts = [f"{content.teacher_parameters:,} parameters"]
    if len(content.shown) > 1:
        statuses = Counter(model.status for model in content.shown)
        counts = [f"{statuses['done']} of {len(content.shown)} models finished"]
        counts += [f"{statuses[status]} {status}" for status in ("stopped", "failed") if statuses[status]]
        parts += [", ".join(counts), f"{len(content.best)} on the front"]
    return " · ".join(parts)


def cards(content: Content) -> list[tuple[str, str, str]]:
    """Return the few numbers that everybody looks for: name, value and note."""
    best, measure = content.best, content.measure
    students = [("student", model) for model in best]
    if len(best) > 1:
        students = [("smallest of the front", best[0]), ("best of the front", best[-1])]
    shown = [("teacher, fp32", figures.size(content.teacher_bytes), measured(measure, content.teacher))]
    shown += [(name, figures.size(model.packed_bytes), measured(measure, model.metrics)) for name, model in students]
    if best and best[0].ratio is not None:
        shown.append(("smaller by", f"{best[0].ratio:.1f}x", best[0].label))
    every = [*content.shared_costs, *(cost for model in content.shown for cost in model.costs)]
    if any(cost.seconds is not None for cost in every):
        shown.append(("cost", f"{worker_hours(every):.2f} h", "worker-hours in all"))
    return shown


def measured(name: str, metrics: dict[str, float]) -> str:
    """Return a metric of the test split with its name, if it was measured."""
    return f"{name} {number(metrics[name])} on test" if name in metrics else ""


def columns(content: Content) -> list[str]:
    """Return the headings of the table of models."""
    timed = ["ms a token"] if content.timed else []
    measured = [*metrics(content), f"{content.measure} on validation"]
    return ["model", "status", "bits", "bytes", "ratio", *timed, *measured, "worker-hours", "version"]


def metrics(content: Content) -> list[str]:
    """Return the metrics of the table; the logarithm of the perplexity would say it twice."""
    return [name for name in content.metrics if name != "nats_per_token"]


def row(model: Shown, content: Content) -> dict[str, Any]:
    """Return the cells of a model, each with what it is sorted by: its text, or a number that may be missing."""
    hours, chosen_by = worker_hours(model.costs), model.validation.get(content.measure)
    times = [model.token_ms] if content.timed else []
    version = " ".join([model.version, *(f"@{alias}" for alias in model.aliases)]).strip()
    cells: list[tuple[str, Any]] = [
        *((text, text) for text in (model.label, model.status, model.bits)),
        (figures.size(model.packed_bytes), model.packed_bytes),
        ("" if model.ratio is None else f"{model.ratio:.1f}x", model.ratio),
        *((number(value), value) for value in [*times, *map(model.metrics.get, metrics(content)), chosen_by]),
        (f"{hours:.3f}" if hours else "", hours or None),
        (version, version),
    ]
    return {"cells": cells, "best": model in content.best, "failure": model.failure}


def cost_lines(content: Content) -> list[dict[str, Any]]:
    """Return seconds and worker-hours by stage: shared ones once, the others summed over the models; then all."""
    own = [cost for model in content.shown for cost in model.costs]
    groups = [
        (stage, [cost for cost in costs if cost.stage == stage], shared)
        for costs, shared in ((content.shared_costs, len(content.shown) > 1), (own, False))
        for stage in dict.fromkeys(cost.stage for cost in costs)
    ]
    everything = [cost for _, costs, _ in groups for cost in costs]
    return [cost_line(*group) for group in (*groups, ("all", everything, False))]


def cost_line(stage: str, costs: Sequence[Cost], shared: bool) -> dict[str, Any]:
    """Return what the runs of a stage took, as far as it was noted."""
    known = [cost for cost in costs if cost.seconds is not None]
    seconds = f"{sum(cost.seconds or 0 for cost in known):,.1f}" if known else "not noted"
    hours = f"{worker_hours(known):.3f}" if known else ""
    return {"stage": stage, "runs": len(costs), "seconds": seconds, "hours": hours, "shared": shared}


def number(value: float | None) -> str:
    """Return four digits, for people."""
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
