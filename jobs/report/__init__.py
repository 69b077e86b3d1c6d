"""`bitmill report`: a run or a sweep as one page, a picture and a table. `values` says what a report shows, `reader`
builds that from a store, and `figures`, `page` and `files` show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.display import check_page
from jobs.report.files import picture, table
from jobs.report.latency import measure
from jobs.report.page import page
from jobs.report.reader import Reader
from jobs.report.values import Content
from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.store.locations import scratch_dir, storage_uri


def report(key: str, out: Path, resources: Resources, console: Console, timed: bool = False) -> dict[str, Any]:
    """Write the page of a run or sweep, with .png and .csv beside it; returns the document of `--json`. `timed`
    measures the latency of its models first."""
    check_page(out, "--out")
    reader = Reader(storage_uri(resources), scratch_dir(resources), resources.local_cache_gib)
    content = reader.content(key)
    if timed:
        measure(reader.packages(content), console)
        content = reader.content(key)
    files = write(content, out)
    best = ", ".join(model.label for model in content.best) or "none"
    console.print(f"{content.title}: {len(content.shown)} shown, on the front: {best}")
    for path in files.values():
        console.print(f"  {path}", soft_wrap=True)
    return {"key": key, "kind": content.kind, "front": [model.key for model in content.best], "files": files}


def rendered(content: Content) -> dict[str, bytes]:
    """Render the page, the picture and the table, by suffix."""
    return {".html": page(content).encode(), ".png": picture(content), ".csv": table(content).encode("utf-8")}


def write(content: Content, out: Path) -> dict[str, str]:
    """Write the page at `out`, picture and table beside it. Raises ConfigError if `out` cannot be written to."""
    files = rendered(content)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, data in files.items():
            out.with_suffix(suffix).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written to: {error}") from error
    return {suffix.removeprefix("."): str(out.with_suffix(suffix)) for suffix in files}
