"""`bitmill pull`: a package from the registry, a store or a directory, every byte checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.model_argument import files_of
from pipeline.config.resources import Resources
from pipeline.package.pull import pull as bring


def pull(model: str, destination: str, resources: Resources, console: Console) -> dict[str, Any]:
    """Bring a package to a directory; returns the document of `--json`."""
    folder = Path(destination).expanduser().absolute()
    pulled = bring(files_of(model, resources), folder, model)
    size = sum(entry["bytes"] for entry in pulled.manifest["files"].values())
    console.print(
        f"{folder}: {len(pulled.fetched)} files fetched, {len(pulled.kept)} were there; {size:,} bytes, each checked",
        highlight=False,
        soft_wrap=True,
    )
    return {
        "model": model,
        "folder": str(folder),
        "bytes": size,
        "fetched": list(pulled.fetched),
        "kept": list(pulled.kept),
        "digest": pulled.manifest["digest"],
    }
