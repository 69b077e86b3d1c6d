"""The command line. stdout carries one JSON document with `--json`; everything else goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ layer writes to stderr past every logger
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from pipeline.errors import BitmillError, ConfigError

app = typer.Typer(
    name="bitmill",
    help="Compress generative language models by quantization-aware distillation, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class Exit(IntEnum):
    """Exit statuses other than 0, done."""

    FAILED = 1
    USAGE = 2


ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for ones to start from.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override one value of the file, e.g. distill.steps=200."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def bitmill() -> None:
    """Text and a teacher in, a small registered model out. Start with: `bitmill compress configs/quickstart.yaml`."""


@app.command()
def compress(
    config: ConfigFile,
    bits: Annotated[str | None, typer.Option(help="W-E-A, such as 2-2-8: short for --set quant.bits=...")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, best or smallest: short for --set preset=...; the file's own values win.")
    ] = None,
    overrides: Overrides = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Stop after this stage.")] = "register",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for a step that another process runs.")] = True,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run, what is reused, and why.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the whole line: tokenize, finetune, cache, distill, evaluate, pack, register.

    Steps that were done before are reused. A command that was interrupted, however hard, goes on where it was when
    it is given again. `--plan` starts nothing.
    """

    def work(console: Console) -> dict[str, Any]:
        from jobs.compress import compress as run
        from pipeline.loading import load_config

        named = {"quant.bits": bits, "preset": preset}
        chosen = [*(overrides or []), *(f"{key}={value}" for key, value in named.items() if value)]
        loaded = load_config(config, chosen, _environment())
        return run(loaded, config, console, until=until, only_plan=plan, wait=wait)

    _execute(work, as_json, debug)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, a store URI, name@alias or name/version.")
    ],
    data: Annotated[str, typer.Option(help="Text to score: as data.source of a configuration, such as 'text/*.txt'.")],
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a block; by default 512 or the model's positions.")
    ] = None,
    unit: Annotated[str, typer.Option(help="document or line, as data.unit of a configuration.")] = "document",
    text_column: Annotated[str, typer.Option(help="Column of jsonl or parquet that holds the text.")] = "text",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a pass; ranges per token make it irrelevant.")] = 16,
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Registry for name@alias.")
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(envvar="BITMILL_STORAGE_URI", help="Store beside which the default registry lies.")
    ] = "./bitmill-store",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a packed model or a Hugging Face directory: perplexity and bits per byte."""

    def work(console: Console) -> dict[str, Any]:
        from jobs.evaluate import evaluate as run
        from pipeline.config import Resources

        if unit not in ("document", "line"):
            raise ConfigError(f"--unit is {unit!r}; valid: document, line")
        resources = Resources(storage_uri=storage_uri, tracking_uri=tracking_uri)
        return run(model, data, block_length, unit, text_column, batch, resources, console)

    _execute(work, as_json, debug)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A packed directory, its store URI, name@alias or name/version.")
    ],
    format_name: Annotated[str, typer.Option("--format", help="transformers, gguf or compressed-tensors.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty directory.")],
    data: Annotated[
        str | None, typer.Option(help="Text to verify on, as data.source; without it the model samples some.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime that verifies.")] = 1,
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Registry for name@alias.")
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(envvar="BITMILL_STORAGE_URI", help="Store beside which the default registry lies.")
    ] = "./bitmill-store",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a packed model in another format, run it there, and keep it only if it computes the same.

    The verdict lies beside the export as verdict.json and, for a registered model, in MLflow.
    """

    def work(console: Console) -> dict[str, Any]:
        from jobs.export import export as run
        from pipeline.config import Resources

        resources = Resources(storage_uri=storage_uri, tracking_uri=tracking_uri)
        return run(model, format_name, out, data, threads, resources, console)

    _execute(work, as_json, debug)


bench = typer.Typer(no_args_is_help=True, help="Measure what the README claims; each bench is one command.")
app.add_typer(bench, name="bench")


@bench.command()
def quantizers(
    config: Annotated[
        str, typer.Argument(metavar="[CONFIG]", help="Teacher, task and data; ignored with --teacher.")
    ] = "configs/quickstart.yaml",
    teacher: Annotated[str | None, typer.Option(metavar="DIR", help="A Hugging Face directory as the teacher.")] = None,
    data: Annotated[
        str | None, typer.Option(help="With --teacher: text as data.source; without it the teacher generates some.")
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="W-E-A; may be repeated. Default: 2-2-8.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds; intervals need two.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each student.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimizer step.")] = 16,
    full: Annotated[
        bool, typer.Option("--full", help="The whole table: 2-2-8, 4-4-8 and 8-8-8, 5 seeds, 300 steps. Hours.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help="Only this row, such as best; may be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Students trained side by side; 0: one by one, no Ray.")] = 1,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where tables and pictures go.")] = "bench-quantizers",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every quantizer and preset on the same teacher, tokens, steps and seeds, and print the gaps.

    Each recipe gets a learning-rate search of equal cost, judged on validation. Every run is a keyed step, so an
    interrupted bench goes on where it was.
    """

    def work(console: Console) -> dict[str, Any]:
        from jobs.bench.quantizers import Extent, chosen_rows, compare, scratch_of, teacher_fields
        from pipeline.config import Resources
        from pipeline.loading import load_config, load_fields
        from pipeline.quant.spec import BitWidths

        try:
            widths = tuple(dict.fromkeys(str(BitWidths.parse(text)) for text in bits or ["2-2-8"]))
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        extent = Extent(widths, seeds, steps, batch_size, chosen_rows(only))
        if full:
            extent = Extent(("2-2-8", "4-4-8", "8-8-8"), 5, 300, batch_size, extent.rows)
        chosen = [*(overrides or []), f"resources.workers={workers}"]
        if teacher is None:
            base = load_config(config, chosen, _environment())
        else:
            resources = Resources.model_validate(_environment())
            fields = teacher_fields(Path(teacher), data, extent, scratch_of(resources), console)
            base = load_fields(fields, chosen, _environment(), f"--teacher {teacher}")
        return compare(base, extent, Path(out), console)

    _execute(work, as_json, debug)


@bench.command()
def paper(
    table: Annotated[str, typer.Option(help="1: language modelling and next utterance; 3: summarization.")] = "1",
    scale: Annotated[str, typer.Option(help="tiny: minutes, anywhere; full: what the paper's own takes.")] = "tiny",
    workers: Annotated[int, typer.Option(min=0, help="Students trained side by side; 0: one by one, no Ray.")] = 1,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The paper's table beside ours; each of its cells is marked as seen in a public source or recalled."""

    def work(console: Console) -> dict[str, Any]:
        from jobs.bench.paper import TABLES, beside, requirements
        from pipeline.loading import load_config

        if table not in TABLES or scale not in ("tiny", "full"):
            raise ConfigError(f"--table is {table!r} and --scale {scale!r}; valid: 1 or 3, tiny or full")
        if scale == "full":
            return requirements(table, console)
        chosen = [*(overrides or []), f"resources.workers={workers}"]
        return beside(table, load_config(TABLES[table].tiny, chosen, _environment()), console)

    _execute(work, as_json, debug)


@bench.command()
def inference(
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="A packed model; by default GPT-2 small with random weights.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each engine.")] = 1,
    tokens: Annotated[int, typer.Option(min=8, help="New tokens that are timed.")] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each engine, taken in turn.")] = 5,
    quantizer: Annotated[
        str, typer.Option(help="Levels of the random weights: quantgpt (three), lsq or seq (four).")
    ] = "quantgpt",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Speed, load time and memory of a packed model: our runtime, fp32, dynamic int8 and llama.cpp, on this machine."""

    def work(console: Console) -> dict[str, Any]:
        from pathlib import Path

        from jobs.bench.inference import compare
        from pipeline.config import Resources
        from pipeline.locations import scratch_dir

        if quantizer not in ("quantgpt", "lsq", "seq"):
            raise ConfigError(f"--quantizer is {quantizer!r}; valid: quantgpt, lsq, seq")
        if model is not None and not (Path(model) / "manifest.json").exists():
            raise ConfigError(f"--model is {model!r}, which is not the folder of a packed model")
        cache = Path(scratch_dir(Resources.model_validate(_environment()))).expanduser() / "bench-inference"
        return compare(Path(model) if model else None, quantizer, threads, prompt, tokens, rounds, cache, console)

    _execute(work, as_json, debug)


def _environment() -> dict[str, str]:
    """Resources as the variables of their ecosystems set them; a configuration's own values win."""
    variables = {
        "ray_address": "RAY_ADDRESS",
        "tracking_uri": "MLFLOW_TRACKING_URI",
        "storage_uri": "BITMILL_STORAGE_URI",
    }
    return {field: os.environ[name] for field, name in variables.items() if os.environ.get(name)}


def _execute(work: Any, as_json: bool, debug: bool) -> None:
    console = Console(stderr=True)
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


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
