"""What commands share: options and arguments, exit statuses, and how an error is shown."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import IntEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from jobs.log import JSON, LOG_FORMATS, TEXT, JsonLines, lines_of
from pipeline.credentials import redacted
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
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a store URI, name@alias or name/version.")]
StorageUri = Annotated[
    str, typer.Option(envvar="BITMILL_STORAGE_URI", help="The store of the runs; the default registry lies beside it.")
]
TrackingUri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow server or registry.")]
Namespace = Annotated[str | None, typer.Option(help="The folder of the store, as resources.namespace.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
LogFormat = Annotated[
    str, typer.Option(envvar="BITMILL_LOG_FORMAT", help="What goes to stderr: text, or json, one object a line.")
]

STDOUT, STDERR = 1, 2
WIDTH_OF_JSON = 10_000
WIDTH_OF_LOGS = 120  # a terminal has its own; 80, which rich assumes elsewhere, cuts tables of figures
VARIABLES = {
    "ray_address": "RAY_ADDRESS",
    "tracking_uri": "MLFLOW_TRACKING_URI",
    "storage_uri": "BITMILL_STORAGE_URI",
    "scale_up_minutes": "BITMILL_SCALE_UP_MINUTES",
}


def environment() -> dict[str, str]:
    """Return resources as the variables of their ecosystems set them; a configuration's own values win."""
    return {field: os.environ[name] for field, name in VARIABLES.items() if os.environ.get(name)}


def folder_of(out: str) -> Path:
    """Return the folder that `--out` names. Raises ConfigError unless it is a directory that can be written to, or can
    become one. Makes nothing."""
    path = Path(out)
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {existing} is no directory that you may write to; give another.")
    return path


def _option(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


STORE = [
    _option("tracking_uri", TrackingUri, None),
    _option("storage_uri", StorageUri, "./bitmill-store"),
    _option("namespace", Namespace, None),
]
COMMON = [_option("as_json", Json, False), _option("log_format", LogFormat, TEXT), _option("debug", Debug, False)]


def command(app: typer.Typer, foreign_options: bool = False) -> Callable[[Callable[..., Any]], None]:
    """Return a decorator that makes a command of a function, which returns the document of --json.

    Its parameters are the options, but for three that are given: `console`, for people, `resources`, as --tracking-uri,
    --storage-uri and --namespace say, and `as_json`. Every command has --json, --log-format and --debug. With
    `foreign_options`, options that it does not have are among its arguments.
    """

    def register(work: Callable[..., Any]) -> None:
        own = signature(work, eval_str=True).parameters

        def run(as_json: bool, log_format: str, debug: bool, **values: Any) -> None:
            def act(console: Console) -> Any:
                if "resources" in own:
                    from pipeline.config.load import load_resources

                    values["resources"] = load_resources(**{option.name: values.pop(option.name) for option in STORE})
                if "as_json" in own:
                    values["as_json"] = as_json
                return work(console, **values)

            execute(act, as_json, debug, log_format)

        options = [parameter for name, parameter in own.items() if name not in ("console", "resources", "as_json")]
        options += [*(STORE if "resources" in own else ()), *COMMON]
        keywords = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]
        run.__doc__ = work.__doc__
        run.__signature__ = Signature(keywords)  # type: ignore[attr-defined]  # typer reads it
        app.command(work.__name__, context_settings={"ignore_unknown_options": foreign_options})(run)

    return register


def open_console(log_format: str = TEXT) -> Console:
    """Return the console for people, on stderr. Text is text to it: neither `[extra]` nor `:key:` is markup. Raises
    ConfigError: there is no such format."""
    if log_format not in LOG_FORMATS:
        raise ConfigError(f"--log-format is {log_format!r}; valid: {', '.join(LOG_FORMATS)}")
    style: Any = {"highlight": False, "markup": False, "emoji": False}
    if log_format == JSON:  # whole lines, and no colours, whatever the environment says of terminals
        file = cast("IO[str]", JsonLines(sys.stderr))
        return Console(file=file, width=WIDTH_OF_JSON, force_terminal=False, color_system=None, **style)
    console = Console(stderr=True, **style)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_LOGS
    return console


@contextmanager
def interruptible() -> Iterator[None]:
    """Have what a scheduler or a closing terminal sends interrupt what runs inside as Ctrl-C does, so that it ends what
    it started."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) is signal.SIG_DFL]  # no nohup
    for kind in kinds:
        signal.signal(kind, interrupt)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Have what libraries print meanwhile, in Python or below it, go to stderr: stdout is for the document alone."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)


def execute(work: Callable[[Console], Any], as_json: bool, debug: bool, log_format: str = TEXT) -> None:
    """Do the work, or say in one paragraph why it could not be done; exit with `NOTHING` if its document is empty."""
    console = open_console()
    try:
        console = open_console(log_format)
        with interruptible(), stdout_kept() if as_json else nullcontext():
            document = work(console)
    except (KeyboardInterrupt, SystemExit):  # Ray answers SIGTERM with the latter
        console.print("interrupted; what was committed is kept, and the same command goes on from there")
        raise typer.Exit(Exit.FAILED) from None
    except Exception as error:
        if debug:
            raise
        text = str(error)
        if not isinstance(error, BitmillError):
            text = f"{type(error).__name__}: {text.strip() or 'no message'}\nThis was not foreseen. "
            text += "What was committed is kept; --debug shows the traceback."
        if (lines := lines_of(console)) is not None:
            lines.tell("error", message=redacted(text))
        else:
            console.print(Text.assemble(("error:", "bold red"), " ", redacted(text)), soft_wrap=True)
        raise typer.Exit(Exit.USAGE if isinstance(error, ConfigError) else Exit.FAILED) from None
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    if not document:
        raise typer.Exit(Exit.NOTHING)
