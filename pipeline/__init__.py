"""The map of the house. Floors from the top; each imports only from below, and import-linter holds that.

    jobs        the command line: arguments, environment variables, what is printed
    budget      a width for every module so that the packed file fits; from the flow's sensitivities
    sweep       many runs that share what they can; feed: which trial is next; estimate: its cost
    flow        plan(config) -> steps, run(steps): the straight line of stages
    export      packages in other runtimes' formats, and the proof that they compute the same there
    runtime     the packed model on ONNX Runtime, its weights packed in memory
    stages      tokenize finetune cache distill evaluate pack register: one recipe in, one record out; beside the line:
                sensitivity
    engine      the only Ray: shards by Ray Data, training by Ray Train, plain tasks; tuning: trials by Ray Tune;
                mailbox: from workers to the driver
    training    the one training loop; distillation: what a student learns from its teacher; optimizers, checkpoints;
                diagnostics: what its modules and representations do meanwhile; pictures of that,
                samples of what it writes
    artifact    the packed model on disk: write, check, load; card: its README; packed_size: its bytes from shapes alone
    plugin      transformers loads and saves packages, once this is imported
    encoding    frozen tensors to the tensors of a file and back; strict: how files from outside are read
    allocation  the knapsack: the best few assignments of widths under a limit of bytes
    tasks       how a task makes rows, what a batch asks of a model, how it is scored; families: what is quantized
    sources     where text and models come from, pinned by content
    transfer    a package brought to a directory, every byte checked; manifest: what a package lists of itself
    tracking, registry, lookups     MLflow: runs by key; versions and aliases; which meet `constraints`; live: curves
                while a run goes on
                observer: who is told how it goes
    tables, store, objects  shards in Arrow and Parquet; places of steps, commit-last, leases; a directory or S3
    trials, suggest         values laid over a configuration, and Optuna's next ones
    locations   where store, runs and scratch files lie
    config, schema, sweep_schema, resources, presets, loading   the closed schema, named recipes, a configuration's file
    identity, records       canonical keys, what stages hand on
    quant, distill          the arithmetic, in pure torch; front: the points that nothing dominates

`pipeline.load(DIR)` returns a packed model, ready to run; `pipeline.lookup(max_size_mib=40)` registered ones that fit.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load", "lookup"]


def __getattr__(name: str) -> Any:
    if name == "load":  # on first use, because transformers takes seconds to import
        from pipeline.package.package import load

        return load
    if name == "lookup":
        from pipeline.tracking.lookup import lookup

        return lookup
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
