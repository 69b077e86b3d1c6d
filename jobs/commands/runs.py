"""Commands that compute: compress, sweep, evaluate."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.commands.options import AnyModel, ConfigFile, Overrides, Wait, command, environment
from pipeline.errors import ConfigError

commands = typer.Typer()


@command(commands)
def compress(
    console: Console,
    config: ConfigFile,
    bits: Annotated[str | None, typer.Option(help="W-E-A, such as 2-2-8: short for --set quant.bits=...")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, best or smallest: short for --set preset=...; the file's own values win.")
    ] = None,
    overrides: Overrides = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Stop after this stage.")] = "register",
    wait: Wait = True,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run, what is reused, and why.")] = False,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write the run's report there when all is done.")
    ] = None,
) -> dict[str, Any]:
    """Run the whole line: tokenize, finetune, cache, distill, evaluate, pack, register.

    Steps that were done before are reused. A command that was interrupted, however hard, goes on where it was when
    it is given again. `--plan` starts nothing.
    """
    from jobs.compress import compress as run
    from pipeline.config.load import load_config

    named = {"quant.bits": bits, "preset": preset}
    chosen = [*(overrides or []), *(f"{key}={value}" for key, value in named.items() if value)]
    loaded = load_config(config, chosen, environment())
    return run(loaded, config, console, until=until, only_plan=plan, wait=wait, page=report)


@command(commands)
def sweep(
    console: Console,
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print trials, worker-hours and bytes, with their basis.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials that failed again, which the command otherwise keeps.")
    ] = False,
) -> dict[str, Any]:
    """Try many bit-widths, quantizers or hyper-parameters, as the section `sweep` says, and print what each costs.

    Tokens, teacher and cache are made once. Each trial is what `compress` would run with its values. A sweep that was
    interrupted, however hard, goes on where it was when the command is given again.
    """
    from jobs.sweep import sweep as run
    from pipeline.config.load import load_config

    loaded = load_config(config, overrides, environment())
    return run(loaded, console, only_plan=plan, wait=wait, retry_failed=retry_failed)


@command(commands)
def evaluate(
    console: Console,
    resources: Any,
    model: AnyModel,
    data: Annotated[str, typer.Option(help="Text to score: as data.source of a configuration, such as 'text/*.txt'.")],
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a block; by default 512 or the model's positions.")
    ] = None,
    unit: Annotated[str, typer.Option(help="document or line, as data.unit of a configuration.")] = "document",
    text_column: Annotated[str, typer.Option(help="Column of jsonl or parquet that holds the text.")] = "text",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a pass; ranges per token make it irrelevant.")] = 16,
) -> dict[str, Any]:
    """Score a packed model or a Hugging Face directory: perplexity and bits per byte."""
    from jobs.evaluate import evaluate as run

    if unit not in ("document", "line"):
        raise ConfigError(f"--unit is {unit!r}; valid: document, line")
    return run(model, data, block_length, unit, text_column, batch, resources, console)
