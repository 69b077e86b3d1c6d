"""The map of the house: nine floors, one line a package. Each floor imports only from below; import-linter holds that.

    9  jobs        the command line: arguments, environment variables, what is printed; bench, report
    8  sweep       many runs that share what they can: trials, fronts, budgets of bytes
       retrain     ticks of a schedule: challenger against champion, the gate, decisions and aliases
    7  flow        a configuration to keyed steps, checked before anything starts; the line of stages, run
    6  stages      tokenize finetune cache distill evaluate pack register; beside the line sensitivity, contest
       export      packages in other runtimes' formats, and the proof that they compute the same there
    5  training    the one training loop, and what a student learns from its teacher
       runtime     the packed model on ONNX Runtime, its weights packed in memory
       suites      what is measured beside a task's protocol: text that is written, tasks of lm-eval
    4  tasks       how text becomes rows, what a batch asks of a model, how it is scored
       sources     where text and models come from, pinned by content
       package     the packed model on disk: written, checked, loaded, pulled; taught to transformers
       tracking    runs, versions and lookups: the only MLflow
       execution   tasks, actors, training workers, trials and jobs: the only Ray
    3  store       keys, records, leases and the files of steps; s3 is the only boto3
       models      families, one file each; models built, made into students, frozen
    2  config      the closed schema of a configuration, and the presets; imports no torch
    1  quant       grids, granularities, quantizers, packing: torch and the standard library
       distill     losses, memory bank, negatives: alike
       errors, metrics    the ground: what can go wrong, and each metric once
       credentials        user and password, taken off a URI where it enters
       bootstrap          intervals over documents
       provenance         when and on what something ran, and what code it was

`plugin` is a door: the public name of `package.hf_plugin`, which every model card prints.

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
