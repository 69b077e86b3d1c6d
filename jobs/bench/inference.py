"""`bitmill bench inference`: the packed runtime beside fp32 transformers, torch's dynamic int8 and llama.cpp. All
engines run the same weights with the same number of threads, each measurement in a process of its own, one engine after
the other, round by round, so that what else the machine does falls on all of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from jobs.bench.engines import ENGINES
from jobs.display import Display, print_table
from pipeline.config.quant import Quant
from pipeline.errors import ConfigError, RunError
from pipeline.export import format_named
from pipeline.models.build import build, fp32_bytes, read_config
from pipeline.models.family import family_named
from pipeline.models.student import make_student
from pipeline.package import manifest
from pipeline.package.package import read_package, write_package
from pipeline.quant.frozen import freeze
from pipeline.store.step_store import checksum

MEASURES = {
    "decode_tokens_per_s": ("decode, tokens/s", ".0f"),
    "prefill_tokens_per_s": ("prefill, tokens/s", ".0f"),
    "load_s": ("load, s", ".2f"),
    "resident_mib": ("resident, MiB", ".0f"),
}
Summary = dict[str, dict[str, float]]  # median, least and most of each measure
GPT2_SMALL: dict[str, Any] = {"architecture": "gpt2", "tie_word_embeddings": True}  # transformers' defaults: 124M
READY = "ready"
LONGEST_S = 3600  # of one measurement; what takes longer hangs


def compare(
    model: Path | None, quantizer: str, threads: int, prompt: int, new: int, rounds: int, cache: Path, console: Console
) -> dict[str, Any]:
    """Measure and print; returns the document of `--json`. Without a model: GPT-2 small, random weights of 2 bits.
    Raises ConfigError for an encoder and a decoder, or a model with fewer positions than the tokens asked for."""
    with Display(console) as display:
        with display.stage("prepare"):
            folder, missing = prepare(model, quantizer, cache)
        positions = int(read_config(folder / "package").max_position_embeddings)
        if prompt + new > positions:
            raise ConfigError(
                f"--prompt {prompt} and --tokens {new} are too long for the model's {positions} positions."
            )
        names = [name for name in ENGINES if name not in missing]
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        with display.stage("measure") as advance:
            for done, name in enumerate(names * rounds):
                display.noted("measure", f"round {done // len(names) + 1} of {rounds}: {name}")
                measured[name].append(run_engine(name, folder, threads, prompt, new))
                advance(done + 1, rounds * len(names))
    summary = {name: _summary(runs) for name, runs in measured.items()}
    _print(summary, missing, console, f"{model or 'GPT-2 small, random'}, threads: {threads}, batch: 1")
    document = {"model": str(model or "gpt2-small-random"), "threads": threads, "prompt_tokens": prompt}
    return document | {"new_tokens": new, "rounds": rounds, "engines": summary, "missing": missing}


def prepare(model: Path | None, quantizer: str, cache: Path) -> tuple[Path, dict[str, str]]:
    """Prepare a folder with what each engine loads, and say why an engine has nothing to load."""
    folder = cache / (f"gpt2-small-{quantizer}" if model is None else checksum(model / manifest.MANIFEST).sha256)
    if not (folder / READY).exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "package").mkdir(parents=True)
        if model is None:
            write_random(folder / "package", GPT2_SMALL, quantizer)
        else:
            shutil.copytree(model, folder / "package", dirs_exist_ok=True)
        _write_fp32(folder / "package", folder / "fp32")
        (folder / READY).touch()
    missing = _write_gguf(folder / "package", folder / "gguf")
    return folder, {"llama.cpp": missing} if missing else {}


def write_random(folder: Path, source: dict[str, Any], quantizer: str) -> None:
    """Write a package of random weights at 2-2-8, and a tokenizer of single bytes and the one merge that GGUF needs."""
    config = read_config(source)
    fields = {"bits": "2-2-8", "quantizer": quantizer, "granularity": "per_channel", "gamma_init": "one"}
    quant = Quant.model_validate(fields)
    student = build(config, seed=0)
    family, bytes_ = family_named(config.model_type), fp32_bytes(student)
    make_student(student, quant.spec(), family)
    frozen = freeze(student, quant.spec(), torch.float32, torch.float32)
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "Ġt": len(letters)}, [("Ġ", "t")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    nothing: dict[str, Any] = {"teacher": {}, "student": {}}
    metrics = {**nothing, "validation": nothing, "protocol": "none: random weights"}
    facts = {"name": "random", "teacher_bytes": bytes_, "lineage": {}, "metrics": metrics}
    write_package(folder, frozen, config, quant, "dense", family.name, facts)


def _write_fp32(package: Path, folder: Path) -> None:
    """Write the same weights in fp32, as transformers loads them without us."""
    frozen, config, _ = read_package(package)
    if config.is_encoder_decoder:
        raise ConfigError("--model is an encoder and a decoder; this bench times decoders: GPT-2 and Llama.")
    model = build(config, seed=0)
    state = {name: tensor.float() for name, tensor in frozen.rest.items()}
    for name in frozen.codes:
        weight = frozen.weight(name)
        state[f"{name}.weight"] = weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
    model.load_state_dict(state, strict=False)  # a tied head has no tensor of its own
    model.tie_weights()
    model.save_pretrained(folder)


def _write_gguf(package: Path, folder: Path) -> str:
    """Write the GGUF file, once; returns why there is none."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "xllamacpp is not installed: pip install 'bitmill[bench]'"
    if (folder / READY).exists():
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        writer = format_named("gguf").load()
        writer.check(read_config(package))
        writer.write(package, folder)
    except ConfigError as error:
        return str(error)
    (folder / READY).touch()
    return ""


def run_engine(name: str, folder: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
    """Measure once in a process of its own. Raises RunError with what the process said last."""
    command = [sys.executable, "-m", "jobs.bench.engines", name, str(folder), *map(str, (threads, prompt, new))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST_S)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"The engine {name} did not end within {LONGEST_S} s; ask for fewer tokens.") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RunError(f"The engine {name} ended with status {done.returncode}: {said[-1] if said else 'nothing said'}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _summary(runs: list[dict[str, float]]) -> Summary:
    kinds: dict[str, Callable[..., float]] = {"median": statistics.median, "least": min, "most": max}
    return {measure: {kind: of(run[measure] for run in runs) for kind, of in kinds.items()} for measure in MEASURES}


def _print(summary: dict[str, Summary], missing: dict[str, str], console: Console, title: str) -> None:
    rows = []
    for engine, measures in summary.items():
        forms = [(measures[key], form) for key, (_, form) in MEASURES.items()]
        rows.append([engine, *(f"{m['median']:{f}} ({m['least']:{f}}-{m['most']:{f}})" for m, f in forms)])
    print_table(console, ("engine", *(name for name, _ in MEASURES.values())), rows, title=title)
    for engine, reason in missing.items():
        console.print(f"{engine}: not measured. {reason}")
