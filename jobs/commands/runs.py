"""Commands that compute: compress, sweep, retrain, evaluate; and submit, which has a cluster run one."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.commands.options import AnyModel, ConfigFile, Overrides, Wait, command, environment
from jobs.log import lines_of
from pipeline.credentials import redacted
from pipeline.errors import ConfigError

commands = typer.Typer()
SUBMITTED = ("compress", "sweep", "retrain")  # what a cluster may be asked to run
UsageError: Any = typer.BadParameter.__mro__[1]  # typer has click's own inside, or imports click


def _chosen(overrides: list[str] | None, bits: str | None = None, preset: str | None = None) -> list[str]:
    """Return as overrides all that options change of a configuration."""
    named = {"quant.bits": bits, "preset": preset}
    return [*(overrides or []), *(f"{key}={value}" for key, value in named.items() if value)]


def _loaded(console: Console, config: str, overrides: list[str] | None) -> Any:
    """Return the configuration of a file, and have a log of JSON name it from here on."""
    from pipeline.config.load import load_config

    loaded = load_config(config, overrides, environment())
    if (lines := lines_of(console)) is not None:
        lines.run = loaded.name
    return loaded


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
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would run and why, and what it would take, with its basis.")
    ] = False,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write the run's report there when all is done.")
    ] = None,
) -> dict[str, Any]:
    """Run the whole line: tokenize, finetune, cache, distill, evaluate, pack, register.

    Steps that were done before are reused. A command that was interrupted, however hard, goes on where it was when
    it is given again. `--plan` starts nothing.
    """
    from jobs.compress import compress as run

    loaded = _loaded(console, config, _chosen(overrides, bits, preset))
    return run(loaded, config, console, until=until, only_plan=plan, wait=wait, page=report)


@command(commands)
def sweep(
    console: Console,
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print trials, worker-hours, bytes and requests, with their basis.")
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

    loaded = _loaded(console, config, overrides)
    return run(loaded, console, only_plan=plan, wait=wait, retry_failed=retry_failed)


@command(commands)
def retrain(
    console: Console,
    config: ConfigFile,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Decide again what was decided on this very data.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what a tick would run and why; starts nothing.")] = False,
) -> dict[str, Any]:
    """Run one tick of a schedule: is there new data, and is what it makes better than the champion?

    Safe to run from any scheduler, as often as it likes. Without new data the answer is `unchanged`, in seconds. Else a
    challenger is trained as `compress` would, meets the champion on test rows that neither was trained on, and the
    rules of `retrain.gate` decide; every decision is kept, with its numbers. `busy`: another tick of this name is at
    it, or a rollback took the name meanwhile. A tick that was interrupted, however hard, goes on where it was when the
    command is given again.
    """
    from jobs.schedule.retrain import retrain as run

    return run(_loaded(console, config, overrides), console, force=force, only_plan=plan)


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


@command(commands, foreign_options=True)
def submit(
    console: Console,
    name: Annotated[str, typer.Argument(metavar="COMMAND", help=f"What is to run there: {' or '.join(SUBMITTED)}.")],
    config: ConfigFile,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTIONS OF COMMAND]", help="Such as --bits 4-4-8 --until pack; behind -- also --plan for the job."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="The dashboard, http://HEAD:8265."
        ),
    ] = None,
    job_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="The job's name, which runs once, such as NAME-2026-11-27.  [default: command, name of the "
            "configuration, day in UTC, digest of what is submitted; of retrain with a number once that has ended]",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be sent, and under which id.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the job that has this id.")] = False,
) -> Any:
    """Have a Ray cluster run a command as a job: log on stderr, document on stdout, and the exit status are the job's.

    An id runs once. The same command again, from a second terminal, a cron that retries or after Ctrl-C, attaches to
    the job, whether it runs or has ended; the job itself needs nobody. A cut connection is made again, and the log goes
    on where it was. Without --id a tick of `retrain` is run again once the last one has ended; from cron give each an
    id by its time, so that one that is given twice is run once: `--id NAME-$(date -u +%Y-%m-%dT%H)` every hour.

    Sent are the configuration, with --set, --bits and --preset applied, and this code (`--plan` lists it); no data, no
    store, no password. Paths are those of here: let the cluster share them, or use s3:// and hf://. Keys for S3 and
    MLflow come from the cluster's own environment. The cluster's token: RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH.

    `bitmill submit compress my-model.yaml --address http://HEAD:8265 --id my-model-2026-11-27`
    """
    from jobs import submit as job

    if name not in SUBMITTED:
        raise ConfigError(f"COMMAND is {name!r}; what can be submitted: {', '.join(SUBMITTED)}")
    given, passed_on = _parsed(name, config, options or [])
    loaded = _loaded(console, config, _chosen(**given))
    submission = job.prepare(name, loaded, passed_on, job_id, job.today())
    if plan:
        return job.print_plan(submission, loaded, console)
    if address is None:
        raise ConfigError("--address is missing: the URL of a Ray cluster's dashboard, such as http://HEAD:8265.")
    if stop:
        return job.stop(submission, address, console)

    def commands_of(job_id: str) -> tuple[str, str]:
        this = ["bitmill", "submit", name, config, "--address", address, "--id", job_id]
        return redacted(shlex.join([*this, *(["--", *options] if options else [])])), shlex.join([*this, "--stop"])

    return job.submit(submission, loaded, address, console, commands_of)


def _parsed(name: str, config: str, options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what a command's options change of the configuration, and the options that are left. Raises ConfigError
    for those that it does not have, or that name a file of here."""
    command = typer.main.get_group(commands).commands[name]
    try:
        values = command.make_context(name, [config, *options]).params
    except UsageError as error:
        raise ConfigError(f"{name}: {error.format_message()}") from None
    if values.get("report"):
        raise ConfigError(
            f"--report {values['report']} would be written on the cluster; leave it out, and ask here when the job is "
            "done: bitmill report KEY --out FILE.html"
        )
    given: dict[str, Any] = {key: values[key] for key in ("overrides", "bits", "preset") if key in values}
    passed_on = []
    for option in command.params:
        value = values[option.name]
        if option.name in (*given, "config", "as_json", "log_format", "debug") or value == option.default:
            continue
        if isinstance(value, bool):
            passed_on.append((option.opts if value else option.secondary_opts)[0])
        else:
            passed_on.extend((option.opts[0], str(value)))
    return given, passed_on
