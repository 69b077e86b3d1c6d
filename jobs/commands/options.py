"""What commands share: options and arguments, exit statuses, and how an error is shown."""

from __future__ import annotations

import json
import os
import sys
from enum import IntEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import BitmillError, ConfigError


class Exit(IntEnum):
    """Exit statuses other than 0, done."""

    FAILED = 1
    USAGE = 2
    NOTHING = 3


ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for ones to start from.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override one value of the file, e.g. distill.eval_rows=64."),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for what another process runs.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a store URI, name@alias or name/version.")]
StorageUri = Annotated[
    str, typer.Option(envvar="BITMILL_STORAGE_URI", help="The store of the runs; the default registry lies beside it.")
]
TrackingUri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow server or registry.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


WIDTH_OF_LOGS = 120  # a terminal has its own; 80, which rich assumes elsewhere, cuts tables of figures


def environment() -> dict[str, str]:
    """Resources as the variables of their ecosystems set them; a configuration's own values win."""
    variables = {
        "ray_address": "RAY_ADDRESS",
        "tracking_uri": "MLFLOW_TRACKING_URI",
        "storage_uri": "BITMILL_STORAGE_URI",
    }
    return {field: os.environ[name] for field, name in variables.items() if os.environ.get(name)}


def execute(work: Any, as_json: bool, debug: bool) -> Any:
    """Do the work, or say in one paragraph why it could not be done; returns its document."""
    console = Console(stderr=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_LOGS
    try:
        document = work(console)
    except BitmillError as error:
        if debug:
            raise
        console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.USAGE if isinstance(error, ConfigError) else Exit.FAILED) from None
    except Exception as error:
        if debug:
            raise
        console.print(
            f"[bold red]error:[/] {type(error).__name__}: {_escape(str(error).strip() or 'no message')}\n"
            "This was not foreseen. What was committed is kept; --debug shows the traceback.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(Exit.FAILED) from None
    except KeyboardInterrupt:
        console.print("interrupted; what was committed is kept, and the same command goes on from there")
        raise typer.Exit(Exit.FAILED) from None
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return document


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
