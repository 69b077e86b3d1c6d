"""Commands on models: inspect before anything, and lookup, report, pull, generate, export what was made."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.commands.options import AnyModel, StorageUri, TrackingUri, command

commands = typer.Typer()


@command(commands)
def inspect(
    console: Console,
    resources: Any,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As model.source: a directory, FILE.gguf, org/name@commit, ...")
    ],
    family: Annotated[str, typer.Option(help="As model.family.")] = "auto",
) -> dict[str, Any]:
    """Show what a model is before anything starts: family, matrices, sizes, what takes it, what is unusual.

    Each number of the weights is read once, in about the time of a checksum, and remembered. Nothing is started.
    """
    from dataclasses import asdict

    from jobs.commands.inspection import show
    from pipeline.flow.inspection import inspect_model

    inspected = inspect_model(model, family, resources)
    show(inspected, console)
    return asdict(inspected)


@command(commands)
def lookup(
    console: Console,
    name: Annotated[str | None, typer.Option(help="The registered name.")] = None,
    task: Annotated[str | None, typer.Option(help="language_modeling, chat, next_utterance or summarization.")] = None,
    bits: Annotated[str | None, typer.Option(help="W-E-A, such as 2-2-8.")] = None,
    max_size_mib: Annotated[float | None, typer.Option(help="Most MiB of packed weights, scales included.")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="On the validation split.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="0-1, of next utterance, on validation.")] = None,
    min_rouge_l: Annotated[float | None, typer.Option(help="0-100, of summarization, on validation.")] = None,
    at_least: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Any metric on validation, those of evaluate.suites too; repeat."),
    ] = None,
    at_most: Annotated[list[str] | None, typer.Option(metavar="METRIC=VALUE", help="As --at-least.")] = None,
    format: Annotated[str | None, typer.Option(help="Exported and verified: onnx, gguf, ...")] = None,
    alias: Annotated[str | None, typer.Option(help="Such as champion.")] = None,
    order_by: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="Best on validation first; by default what the task is measured by."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show at most so many.")] = None,
    tracking_uri: TrackingUri = None,
    storage_uri: StorageUri = "./bitmill-store",
) -> list[dict[str, Any]]:
    """Find registered models by what they must not exceed: `bitmill lookup --max-size-mib 40 --max-perplexity 18`.

    Validation finds and orders; scores of the test split are shown beside it. The best one comes first. If none fits,
    the nearest are shown with what they miss by, and the exit status is 3.
    """
    from jobs.lookup import bounds_of
    from jobs.lookup import lookup as run
    from pipeline.store.locations import registry_beside
    from pipeline.tracking.query import Query

    named = bounds_of(at_least or (), "--at-least"), bounds_of(at_most or (), "--at-most")
    wanted = Query(name, task, bits, format, alias, max_size_mib, max_perplexity, min_accuracy, min_rouge_l, *named)
    return run(wanted, order_by, limit, tracking_uri or registry_beside(storage_uri), console)


@command(commands)
def report(
    console: Console,
    key: Annotated[str, typer.Argument(metavar="KEY", help="run_key or sweep_key, as compress and sweep print.")],
    out: Annotated[str, typer.Option(metavar="FILE.html", help="The page; .png and .csv go beside it.")],
    storage_uri: StorageUri = "./bitmill-store",
    namespace: Annotated[str | None, typer.Option(help="As resources.namespace of the run.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="First measure how long each model takes for a token, on this machine.")
    ] = False,
) -> dict[str, Any]:
    """Show a run or a sweep as one page: bytes against accuracy, losses, modules, cost, and how to get each model.

    The page needs no network: send it to somebody, or open it on a phone. A sweep that is not finished is shown as far
    as it came. A measured latency is kept beside its package and shown from then on.
    """
    from jobs.report import report as run
    from pipeline.config.load import load_resources

    resources = load_resources(storage_uri=storage_uri, namespace=namespace)
    return run(key, Path(out), resources, console, latency)


@command(commands)
def pull(
    console: Console,
    resources: Any,
    model: AnyModel,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A directory that does not exist yet, or is empty.")
    ],
) -> dict[str, Any]:
    """Bring a packed model to a directory, every byte checked against its manifest.

    Given again after an interruption it keeps the files that are whole. DEST appears only once all are there.
    """
    from jobs.display import Display
    from jobs.model_argument import files_of
    from pipeline.package.pull import pull as bring

    folder, fetch = Path(destination).expanduser().absolute(), files_of(model, resources)
    with Display(console) as display:

        def shown(name: str, scratch: Path) -> Path:
            with display.stage(name):
                return fetch(name, scratch)

        pulled = bring(shown, folder, model)
    size = sum(entry["bytes"] for entry in pulled.manifest["files"].values())
    counts = f"{len(pulled.fetched)} files fetched, {len(pulled.kept)} were there"
    console.print(f"{folder}: {counts}; {size:,} bytes, each checked", soft_wrap=True)
    files = {"fetched": list(pulled.fetched), "kept": list(pulled.kept)}
    return {"model": model, "folder": str(folder), "bytes": size, **files, "digest": pulled.manifest["digest"]}


@command(commands)
def generate(
    console: Console,
    resources: Any,
    as_json: bool,
    model: AnyModel,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Read from stdin unless given.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token. Summaries come from beam search.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is what a user says, in the chat template.")] = False,
) -> dict[str, Any]:
    """Let a packed model, or a Hugging Face directory, continue a text, or answer it; a summarizing one sums it up."""
    from jobs.generate import Request
    from jobs.generate import generate as run

    text = sys.stdin.read().removesuffix("\n") if prompt is None else prompt
    say = (lambda piece: None) if as_json else partial(print, end="", flush=True)
    return run(model, Request(text, max_tokens, temperature, seed, chat), resources, console, say)


@command(commands)
def export(
    console: Console,
    resources: Any,
    model: AnyModel,
    format_name: Annotated[str, typer.Option("--format", help="onnx, gguf, compressed-tensors or transformers.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty directory.")],
    data: Annotated[
        str | None, typer.Option(help="Text to verify on, as data.source; without it the model samples some.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of the runtime that verifies, in each of its two ways.")
    ] = 1,
) -> dict[str, Any]:
    """Write a packed model in another format, run it there, and keep it only if it computes the same.

    What was measured, each number's floor and what ran lie beside the export as verdict.json and, for a registered
    model, in MLflow. compressed-tensors is read back by transformers and compressed-tensors; vLLM is not run.
    """
    from jobs.export import export as run

    return run(model, format_name, out, data, threads, resources, console)
