"""`bitmill lookup`: the registered models that meet constraints, or how near the nearest ones are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.errors import ConfigError
from pipeline.metrics import LM_EVAL, METRICS, metric_of, printed
from pipeline.tracking.lookup import matches, nearest_misses, reach
from pipeline.tracking.query import NearMiss, Query, RegisteredModel, of_text

SHARES = {metric.name for metric in METRICS.values() if metric.form.endswith("%")}  # others are shown with four digits
SIZE = "size_mib"
SPLITS = "\nvalidation / test"
TEXTS = ("bits", "quantizer", "created")
FOLDED = {"model": 30, "formats": 18}  # to so many characters at least, where a word is as long
UNBOUNDED = 10_000


def lookup(
    wanted: Query, order_by: str | None, limit: int | None, tracking_uri: str, console: Console
) -> list[dict[str, Any]]:
    """Print what fits, the best first; returns the document of `--json`, empty if nothing fits. Raises ConfigError if
    the registry cannot be reached, or for a value that can match nothing."""
    client = reach(tracking_uri)
    models = matches(client, wanted, order_by, limit)
    if models:
        print_found(models, order_by or wanted.measure, console)
    else:
        print_misses(nearest_misses(client, wanted), console)
    return [asdict(model) for model in models]


def bounds_of(given: Iterable[str], option: str) -> dict[str, float]:
    """Return the bounds that an option names, METRIC=VALUE each. Raises ConfigError for anything else."""
    bounds = {}
    for text in given:
        metric, _, value = text.partition("=")
        if metric_of(metric) is None:
            valid = ", ".join(name for name in METRICS if name != "gap")
            raise ConfigError(f"{option} {text!r} names no metric; valid: {valid}, {LM_EVAL}_TASK_METRIC")
        try:
            bounds[metric] = float(value)
        except ValueError:
            raise ConfigError(f"{option} {text!r}: it takes METRIC=VALUE, such as {metric}=0.5") from None
    return bounds


def print_found(models: list[RegisteredModel], metric: str, console: Console) -> None:
    """Print a table of models, without the columns for which the console is too narrow, and how to get the first."""
    columns, left_out = columns_of(models, metric), []
    table, unbounded = table_of(columns), console.options.update(width=UNBOUNDED)
    for heading in reversed([*columns][3:]):  # never the model, its bits, and what it is ordered by
        if console.measure(table, options=unbounded).minimum <= console.width:
            break
        left_out.append(heading.removesuffix(SPLITS))
        del columns[heading]
        table = table_of(columns)
    console.print(table)
    if left_out:
        console.print(f"  too wide for this terminal, and in --json: {', '.join(left_out)}", soft_wrap=True)
    best = models[0]
    for command in (f"bitmill pull {best.name}/{best.version} DEST", f"package: {best.package_uri}"):
        console.print(f"  {command}", soft_wrap=True)


def columns_of(models: list[RegisteredModel], metric: str) -> dict[str, list[str]]:
    """Return headings and cells, the least important last. Of the metrics that any model has, the one they are ordered
    by is first; where the splits differ, validation's, which finds and orders, is shown before the test's."""
    names = list(dict.fromkeys([metric, "perplexity", "accuracy", "rougeL"]))
    names = [name for name in names if name != SIZE and any(name in model.metrics for model in models)]
    scores = {name + SPLITS * of_text(name): [score(model, name) for model in models] for name in names}
    sizes = {"MiB": ["" if model.size_mib is None else f"{model.size_mib:.2f}" for model in models]}
    return {
        "model": [" ".join([f"{m.name}/{m.version}", *(f"@{alias}" for alias in m.aliases)]) for m in models],
        "bits": [model.bits for model in models],
        **(sizes | scores if metric == SIZE else dict([*scores.items()][:1]) | sizes | scores),
        "quantizer": [model.quantizer for model in models],
        "formats": [" ".join(model.formats) for model in models],
        "created": [model.created_at[:10] for model in models],
    }


def score(model: RegisteredModel, name: str) -> str:
    """Return a metric's value, of both splits where they differ."""
    splits = (model.validation, model.metrics) if of_text(name) else (model.metrics,)
    values = [printed(name if name in SHARES else "", metrics.get(name)) for metrics in splits]
    return " / ".join(value or "-" for value in values) if any(values) else ""


def table_of(columns: dict[str, list[str]]) -> Table:
    """Return a table of columns, of which only those of several words give way."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, cells in columns.items():
        if heading in FOLDED:
            longest = max(len(word) for cell in cells for word in [*cell.split(), heading])
            table.add_column(heading, overflow="fold", min_width=min(longest, FOLDED[heading]))
        else:
            width = max(len(line) for text in (heading, *cells) for line in text.splitlines() or [""])
            table.add_column(
                heading, justify="right" if heading not in TEXTS else "left", no_wrap=True, min_width=width
            )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def print_misses(misses: list[NearMiss], console: Console) -> None:
    """Print why nothing fits."""
    if not misses:
        console.print("nothing matched: no model of bitmill is registered here")
        return
    console.print("nothing matched; the nearest:")
    for miss in misses:
        line = f"  {miss.model.name}/{miss.model.version} ({miss.model.bits}): {'; '.join(miss.reasons)}"
        console.print(line, soft_wrap=True)
