"""The command line. stdout carries one JSON document with `--json`; everything else goes to stderr."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # on which --json prints one document
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ layer writes to stderr past every logger
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away is tried again by our outbox
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune prints a banner otherwise
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # curves go to MLflow
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # an interrupt ends the command

import typer

from jobs.commands import bench, models, runs, schedule

app = typer.Typer(
    name="bitmill",
    help="Compress generative language models by quantization-aware distillation, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def bitmill() -> None:
    """Text and a teacher in, a small registered model out. Start with: `bitmill compress configs/quickstart.yaml`."""


app.add_typer(runs.commands)
app.add_typer(schedule.commands)
app.add_typer(models.commands)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Run the command line."""
    gc.set_threshold(50_000, 20, 20)  # imports make objects that stay; looking through them takes a tenth of the time
    try:
        app()
    finally:
        gc.freeze()  # what the process ends with needs no last look either


if __name__ == "__main__":
    main()
