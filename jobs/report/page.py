"""The page: one HTML file that needs nothing else. Names and values are data to it, never markup or script."""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jobs.report import figures
from jobs.report.files import picture
from jobs.report.values import Content, Cost, Shown, worker_hours

TEXT_COLUMNS = ("model", "bits", "status", "version")


def page(content: Content) -> str:
    """The whole HTML."""
    folder = resources.files("jobs.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    drawn = {
        "trade_off": figures.trade_off(content),
        "speed": figures.speed(content),
        "losses": figures.losses(content),
        "modules": [figures.bits_of_modules(one) for one in with_modules(content)],
    }
    return template.render(
        content=content,
        headline=headline(content),
        cards=cards(content),
        columns=columns(content),
        text_columns=TEXT_COLUMNS,
        rows=[row(one, content) for one in content.shown],
        costs=cost_lines(content),
        figures=drawn,
        marks=figures.paper_marks(content),
        with_modules=with_modules(content),
        machines=", ".join(sorted({one.latency.machine for one in content.shown if one.latency is not None})),
        picture=base64.b64encode(picture(content)).decode(),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        size=figures.size,
        number=number,
    )


def with_modules(content: Content) -> list[Shown]:
    """Models whose modules are known, those of the front first."""
    best = content.best
    return [one for one in [*best, *(o for o in content.shown if o not in best)] if one.modules]


def headline(content: Content) -> str:
    done = sum(one.status == "done" for one in content.shown)
    parts = [f"{content.teacher_parameters:,} parameters"]
    if len(content.shown) > 1:
        counts = [f"{done} of {len(content.shown)} models finished"]
        counts += [
            f"{sum(one.status == status for one in content.shown)} {status}"
            for status in ("stopped", "failed")
            if any(one.status == status for one in content.shown)
        ]
        parts += [", ".join(counts), f"{len(content.best)} on the front"]
    return " · ".join(parts)


def cards(content: Content) -> list[dict[str, str]]:
    """The few numbers that everybody looks for."""
    measure = content.measure
    found = [card("teacher, fp32", figures.size(content.teacher_bytes), measured(measure, content.teacher))]
    best = content.best
    if len(best) > 1:
        found.append(
            card("smallest of the front", figures.size(best[0].packed_bytes), measured(measure, best[0].metrics))
        )
        found.append(
            card("best of the front", figures.size(best[-1].packed_bytes), measured(measure, best[-1].metrics))
        )
    elif best:
        found.append(card("student", figures.size(best[0].packed_bytes), measured(measure, best[0].metrics)))
    if best and best[0].ratio is not None:
        found.append(card("smaller by", f"{best[0].ratio:.1f}x", best[0].label))
    every = [*content.shared_costs, *(cost for one in content.shown for cost in one.costs)]
    if any(cost.seconds is not None for cost in every):
        found.append(card("cost", f"{worker_hours(every):.2f} h", "worker-hours in all"))
    return found


def card(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def measured(name: str, metrics: dict[str, float]) -> str:
    return f"{name} {number(metrics[name])}" if name in metrics else ""


def columns(content: Content) -> list[str]:
    timed = ["ms a token"] if content.timed else []
    return ["model", "status", "bits", "bytes", "ratio", *timed, *metrics(content), "worker-hours", "version"]


def metrics(content: Content) -> list[str]:
    """Metrics of the table; the logarithm of the perplexity would say it twice."""
    return [name for name in content.metrics if name != "nats_per_token"]


def row(one: Shown, content: Content) -> dict[str, Any]:
    """Cells of a model, each with what it is sorted by."""
    hours = worker_hours(one.costs)
    cells = [
        cell(one.label),
        cell(one.status),
        cell(one.bits),
        cell(figures.size(one.packed_bytes), one.packed_bytes),
        cell("" if one.ratio is None else f"{one.ratio:.1f}x", one.ratio),
        *([cell(number(one.token_ms), one.token_ms)] if content.timed else []),
        *(cell(number(one.metrics.get(name)), one.metrics.get(name)) for name in metrics(content)),
        cell(f"{hours:.3f}" if hours else "", hours or None),
        cell(" ".join([one.version, *(f"@{alias}" for alias in one.aliases)]).strip()),
    ]
    return {"cells": cells, "best": one in content.best, "failure": one.failure}


def cell(text: str, value: float | str | None = "") -> dict[str, Any]:
    return {"text": text, "sort": "" if value is None else text if value == "" else value}


def cost_lines(content: Content) -> list[dict[str, Any]]:
    """Seconds and worker-hours by stage: shared ones once, the others summed over the models; then all."""
    own: dict[str, list[Cost]] = {}
    for one in content.shown:
        for cost in one.costs:
            own.setdefault(cost.stage, []).append(cost)
    shared: dict[str, list[Cost]] = {}
    for cost in content.shared_costs:
        shared.setdefault(cost.stage, []).append(cost)
    lines = [cost_line(stage, found, len(content.shown) > 1) for stage, found in shared.items()]
    lines += [cost_line(stage, found, False) for stage, found in own.items()]
    return [*lines, cost_line("all", [*content.shared_costs, *(c for found in own.values() for c in found)], False)]


def cost_line(stage: str, found: Sequence[Cost], shared: bool) -> dict[str, Any]:
    known = [cost for cost in found if cost.seconds is not None]
    seconds = f"{sum(cost.seconds or 0 for cost in known):,.1f}" if known else "not noted"
    hours = f"{worker_hours(known):.3f}" if known else ""
    return {"stage": stage, "runs": len(found), "seconds": seconds, "hours": hours, "shared": shared}


def number(value: float | None) -> str:
    """Four digits, for people."""
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
