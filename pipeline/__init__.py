"""The map of the house. Floors from the top; each imports only from below, and import-linter holds that.

    jobs        the command line: arguments, environment variables, what is printed
    flow        plan(config) -> steps, run(steps): the straight line of stages
    export      packages in other runtimes' formats, and the proof that they compute the same there
    stages      tokenize finetune cache distill evaluate pack register: one recipe in, one record out
    engine      the only Ray: shards by Ray Data, training by Ray Train, plain tasks
    training    the one training loop; distillation: what a student learns from its teacher; optimizers, checkpoints;
                diagnostics: what its modules and representations do meanwhile; pictures of that
    export      the packed model in formats of other runtimes, each verified there
    runtime     the packed model on a CPU by ONNX Runtime, weights packed
    artifact    the packed model on disk: write, check, load
    tasks       how a task makes rows, what a batch asks of a model, how it is scored; families: what is quantized
    sources     where text and models come from, pinned by content
    tracking, registry      MLflow: runs by key; versions and aliases
    tables, store, objects  shards in Arrow and Parquet; places of steps, commit-last, leases; a directory or S3
    locations   where store, runs and scratch files lie
    config, schema, presets, loading        the closed schema, named recipes, a configuration from a file
    identity, records       canonical keys, what stages hand on
    quant, distill          the arithmetic, in pure torch

`pipeline.load(DIR)` returns a packed model, ready to run.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # on first use, because transformers takes seconds to import
        from pipeline.artifact import load

        return load
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
