"""`bitmill bench`: the measured claims of jobs/bench/README.md, each by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.commands.options import Overrides, command, environment, folder_of
from pipeline.errors import ConfigError

QUICKSTART = "configs/quickstart.yaml"
Workers = Annotated[int, typer.Option(min=0, help="Students trained side by side; 0: one by one, no Ray.")]
bench = typer.Typer(no_args_is_help=True, help="Measure what the README claims; each bench is one command.")


@command(bench)
def quantizers(
    console: Console,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help=f"Teacher, task and data, or --teacher.  [default: {QUICKSTART}]"),
    ] = None,
    teacher: Annotated[str | None, typer.Option(metavar="DIR", help="A Hugging Face directory as the teacher.")] = None,
    data: Annotated[
        str | None, typer.Option(help="With --teacher: text as data.source; without it the teacher generates some.")
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="W-E-A; may be repeated.  [default: 2-2-8]")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Paired seeds; intervals need two.  [default: 1]", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Optimizer steps of each student; above 2 bits a third.  [default: 60]", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimizer step.")] = 16,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="The whole table: these default to 2-2-8, 4-4-8 and 8-8-8, 5 seeds, 300 steps. Hours."
        ),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Only this row, such as best; may be repeated.")
    ] = None,
    granularity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G",
            help="Every quantizer with scales per_tensor, per_channel or per_group=32, 64 or 128; may be repeated.",
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            help="Three rates for each recipe, and three weights of contrast for the reference; without it one."
        ),
    ] = True,
    workers: Workers = 1,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where tables and pictures go.")] = "bench-quantizers",
) -> dict[str, Any]:
    """Train every quantizer and preset on the same teacher, tokens, steps and seeds, and print the gaps.

    Validation chooses each recipe's learning rate among three, with a seed of its own, and for the paper's recipe, with
    which all are compared, the weight of contrast. An interrupted bench goes on where it was: its runs are keyed steps.
    """
    from jobs.bench.quantizers import OPTIONS, TEACHER_OPTIONS, Extent, chosen_rows, compare, teacher_fields
    from jobs.bench.students import refuse_decided
    from pipeline.config.load import load_config, load_fields
    from pipeline.quant.spec import BitWidths

    try:
        given = bits or (["2-2-8", "4-4-8", "8-8-8"] if full else ["2-2-8"])
        widths = tuple(dict.fromkeys(str(BitWidths.parse(text)) for text in given))
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    if "32-32-32" in widths:
        raise ConfigError("--bits 32-32-32: nothing is quantized, so there is nothing to compare.")
    rows = chosen_rows(only, granularity)
    extent = Extent(widths, seeds or (5 if full else 1), steps or (300 if full else 60), batch_size, rows, search)
    refuse_decided(overrides or [], OPTIONS | (TEACHER_OPTIONS if teacher is not None else {}))
    chosen = [*(overrides or []), f"resources.workers={workers}"]
    if teacher is None:
        path = config or QUICKSTART
        if data is not None:
            raise ConfigError(f"--data {data} goes with --teacher DIR; without it {path} says what is read.")
        return compare(load_config(path, chosen, environment()), extent, folder_of(out), console)
    if config is not None:
        raise ConfigError(f"{config} and --teacher {teacher} both name a teacher; give one of them.")
    fields = teacher_fields(Path(teacher), data or "generated.jsonl", extent)
    base = load_fields(fields, chosen, environment(), f"--teacher {teacher}")
    return compare(base, extent, folder_of(out), console, Path(teacher) if data is None else None)


@command(bench)
def paper(
    console: Console,
    table: Annotated[str, typer.Option(help="1: language modelling and next utterance; 3: summarization.")] = "1",
    scale: Annotated[str, typer.Option(help="tiny: small models, anywhere; full: data, GPUs, commands.")] = "tiny",
    workers: Workers = 1,
    overrides: Overrides = None,
) -> dict[str, Any]:
    """The paper's table beside ours; each of its cells is marked as seen in a public source or recalled."""
    from jobs.bench.paper import OPTIONS, OWN, TABLES, beside, requirements
    from jobs.bench.students import refuse_decided
    from pipeline.config.load import load_config

    if table not in TABLES or scale not in ("tiny", "full"):
        raise ConfigError(f"--table is {table!r} and --scale {scale!r}; valid: 1 or 3, tiny or full")
    refuse_decided(overrides or [], OPTIONS, OWN)
    if scale == "full":
        if overrides:
            raise ConfigError(f"--set {overrides[0]} has no effect with --scale full, which runs nothing.")
        return requirements(table, console)
    chosen = [*(overrides or []), f"resources.workers={workers}"]
    bases = [load_config(tiny.config, [*tiny.overrides, *chosen], environment()) for tiny in TABLES[table].tiny]
    return beside(table, bases, console)


@command(bench)
def sizes(console: Console) -> dict[str, Any]:
    """Bytes of packed GPT-2 small and BART base, random weights, at three bit-widths and in each encoding. Minutes."""
    from jobs.bench.sizes import measure

    return measure(console)


@command(bench)
def scale(
    console: Console,
    mib: Annotated[
        float, typer.Option(min=0.01, help="MiB of the smallest of four texts; the largest has 10 times.")
    ] = 20,
    objects: Annotated[int, typer.Option(min=1, help="Objects of the large store.")] = 100_000,
    versions: Annotated[int, typer.Option(min=1, help="Versions of its registry.")] = 20_000,
    jsonl_gz_mib: Annotated[
        float | None,
        typer.Option(min=0.01, help="Only the memory of a worker that tokenizes a .jsonl.gz of so many MiB, unpacked."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where scale.json and scale.png go.")] = "bench-scale",
) -> dict[str, Any]:
    """Time and memory of tokenize and cache as text grows tenfold; what asks of a large store. Minutes."""
    from jobs.bench.scale import worker
    from jobs.bench.scale.measure import alone, measure

    if jsonl_gz_mib is not None:
        document = worker.measure(jsonl_gz_mib, folder_of(out), alone)
        console.print(worker.told(document))
        return document
    return measure(mib, objects, versions, folder_of(out), console)


@command(bench)
def chaos(
    console: Console,
    faults: Annotated[int, typer.Option(min=1, help="Strikes: kills, stops, times in which S3 fails.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the draws; what is there to strike depends on the machine.")] = 0,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where chaos.json goes.")] = "bench-chaos",
) -> dict[str, Any]:
    """Compress a model while nodes, workers and S3 fail, and undisturbed; status 1 if the packages differ. Minutes.

    Three Ray nodes and an S3 are started on this machine, and end with the command. Every few seconds a worker, an
    actor, a node or the command is killed, a shard is spoilt, or S3 fails in one of seven ways.
    """
    from jobs.bench.chaos.measure import measure

    return measure(faults, seed, folder_of(out), console)


@command(bench)
def inference(
    console: Console,
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
) -> dict[str, Any]:
    """Speed, load time and memory of a packed model: our runtime, fp32, dynamic int8 and llama.cpp, on this machine."""
    from jobs.bench.inference import compare
    from pipeline.config.load import load_resources
    from pipeline.store.locations import scratch_dir

    if quantizer not in ("quantgpt", "lsq", "seq"):
        raise ConfigError(f"--quantizer is {quantizer!r}; valid: quantgpt, lsq, seq")
    if model is not None and not (Path(model) / "manifest.json").exists():
        raise ConfigError(f"--model is {model!r}, which is not the folder of a packed model")
    cache = Path(scratch_dir(load_resources(**environment()))).expanduser() / "bench-inference"
    return compare(Path(model) if model else None, quantizer, threads, prompt, tokens, rounds, cache, console)


@command(bench)
def train(
    console: Console,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the GPT-2 that is trained.")] = 12,
    width: Annotated[int, typer.Option(min=8, help="Width of its hidden states.")] = 768,
    heads: Annotated[int, typer.Option(min=1, help="Heads of its attention, which divide the width.")] = 12,
    vocab: Annotated[int, typer.Option(min=16, help="Tokens of its vocabulary.")] = 50257,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a row.  [default: 512 on a GPU, 128 on a CPU]", show_default=False),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a step.  [default: 32 on a GPU, 16 on a CPU]", show_default=False),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a pass.  [default: all of a step]", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of a round.  [default: 8 on a GPU, 1 on a CPU]", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each row, in turn with the baseline.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Only this row, such as 'best, cached'; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it is computed: auto, cuda or cpu.")] = "auto",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile layers, as resources.compile.  [default: on a GPU]"),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write what takes the most time of each row.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare with committed floors; exit with 1 if a ratio of the rows that are measured misses its own.",
        ),
    ] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where train.json and train.md go.")] = "bench-train",
) -> dict[str, Any]:
    """Time a training step of each kind beside transformers' own, on this machine's GPU or CPU, with random weights."""
    from jobs.bench.training.held import chosen_device
    from jobs.bench.training.steps import Shape
    from jobs.bench.training.train import (
        CPU_SHAPE,
        GPU_SHAPE,
        Extent,
        chosen_rows,
        compare,
        read_floors,
        shortfalls,
    )
    from pipeline.errors import RunError

    rows, place = chosen_rows(only), chosen_device(device)
    defaults = GPU_SHAPE if place.type == "cuda" else CPU_SHAPE
    of_step = batch or defaults["batch"]
    shape = Shape(layers, width, heads, vocab, length or defaults["length"], of_step, micro_batch or of_step)
    extent = Extent(steps or defaults["steps"], rounds, rows, profile)
    if width % heads:
        raise ConfigError(f"--heads {heads} does not divide --width {width}.")
    floors = read_floors(place) if check else {}
    document = compare(shape, place, compiled, extent, folder_of(out), console)
    if document["failed"]:
        raise RunError(f"These rows failed, and {out}/train.json has the rest: {'; '.join(document['failed'])}")
    if check and (missed := shortfalls(document, floors)):
        raise RunError("What was measured misses the floors: " + "; ".join(missed))
    return document


@command(bench)
def real(
    console: Console,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Rows as `compress --until tokenize` left them: STORE/tokenize/KEY."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="In place of --tokens: text as data.source, tokenized here.")] = None,
    model: Annotated[
        str, typer.Option(help="The model, as model.source: a directory or a hub id.")
    ] = "HuggingFaceTB/SmolLM2-135M",
    minutes: Annotated[
        float,
        typer.Option(min=0, help="For all that has no result yet, rows by their shares; compilation comes beside."),
    ] = 10,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a row, at most, whatever the time.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Only this row, such as 'best, 2-2-8'; may be repeated.")
    ] = None,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="A few steps of GPT-2 small and BART base, random weights; nothing else.")
    ] = False,
    block_length: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Tokens of a row, with --text or --shapes.  [default: 512; with --shapes on a CPU: 128]",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of an optimizer step.  [default: 64; with --shapes: 16 on a GPU, 2 on a CPU]",
            show_default=False,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a pass.  [default: 64; with --shapes: half of a step's]", show_default=False),
    ] = None,
    finetune_lr: Annotated[float, typer.Option(min=0, help="Rate at which the teacher is trained.")] = 1e-4,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="Where it is computed: auto, cuda or cpu.")] = "auto",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile layers, as resources.compile.  [default: on a GPU]"),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Everything: results, checkpoints, table.")] = "bench-real",
) -> dict[str, Any]:
    """Fine-tune a real model and distil it by every preset with the teacher online, in so many minutes of this machine.

    The same command goes on where it was: finished rows stay, and a stopped one goes on from its last checkpoint.
    `--set distill.KNOB=value` is laid over every row.
    """
    from jobs.bench.training.held import chosen_device
    from jobs.bench.training.real import (
        RealBench,
        Settings,
        chosen_rows,
        distill_overrides,
        prepared_tokens,
        tokens_of_text,
    )
    from jobs.bench.training.shapes import Extent, smoke
    from pipeline.sources.content import ContentMemo
    from pipeline.sources.models import pin_model

    rows, place, folder = chosen_rows(only), chosen_device(device), folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    if shapes:
        return smoke(place, compiled, folder, console, Extent.of(place, batch, micro_batch, block_length))
    if (tokens is None) == (text is None):
        raise ConfigError("give --tokens or --text: rows that are prepared, or text to make them of")
    laid_over = distill_overrides(overrides or [])
    source = pin_model(model, "--model", ContentMemo(str(folder)))
    scratch = folder / ".scratch"
    prepared = (
        prepared_tokens(Path(tokens), scratch)
        if tokens is not None
        else tokens_of_text(model, text or "", block_length or 512, folder)
    )
    of_pass = micro_batch or 64
    settings = Settings(minutes, batch or 64, of_pass, of_pass, finetune_lr, rows, steps, laid_over, compiled)
    return RealBench(folder, source, prepared, place, settings, console).run()
