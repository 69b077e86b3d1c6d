"""The registered version whose latent weights a student starts from: found when the plan is made, and checked to fit
before any worker starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.models.build import read_config
from pipeline.stages.register import LATENT_TAG
from pipeline.stages.stage import PinnedRun, Start
from pipeline.store.keys import recipe_of
from pipeline.store.locations import scratch_dir, storage_uri, tracking_uri
from pipeline.store.records import Package, Record, Student, Tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.tracking import registry, runs

if TYPE_CHECKING:  # which takes long to import
    from transformers import PreTrainedConfig

KNOB = "distill.start"
# What a student computes with its weights. How gradients pass, where scales begin and in what dtypes tensors ship may
# be another's.
SAME = ("bits", "overrides", "quantizer", "granularity", "activation_range", "attention")
# Settings of an architecture that say nothing of what trained weights mean, by parts of their names.
WITHOUT_MEANING = ("token_id", "drop", "use_cache", "init", "summary_", "quantization_config", "task_specific_params")


def find(config: Config, model: str) -> Start:
    """Return the version that `name@alias` or `name/version` means. Its tags say all of it: the store is not asked, so
    that a run which is done needs no more than the registry.

    Raises:
        ConfigError: the registry cannot be reached, has no such version, or one that names no latent weights.
    """
    resources = config.resources
    uri = tracking_uri(resources)
    version = registry.resolve(runs.connect(uri), model, KNOB)
    name, tags = f"{version.name}/{version.version}", version.tags

    def place(kind: type[Record]) -> StepDir:
        root, key = storage_uri(resources), tags[f"bitmill.{kind.stage}"]
        return StepDir(root, kind.stage, key, scratch_dir(resources), local_cache_gib=resources.local_cache_gib)

    try:
        return Start(name, tags[LATENT_TAG], place(Student), place(Package))
    except KeyError as error:
        raise ConfigError(
            f"{KNOB} is {model!r}, and {name} names no latent weights (the registry at {uri} has no tag {error} of "
            "it). Valid: name@alias or name/version of what bitmill registered."
        ) from error


def named(config: Config, version: str) -> Config:
    """Return a configuration whose student starts from a version."""
    return config.model_copy(update={"distill": config.distill.model_copy(update={"start": version})})


def check(run: PinnedRun, start: Start, config: PreTrainedConfig, rows: StepDir, tokens: Tokens | None) -> Student:
    """Return the record of the student that the version holds, once its weights are seen to be there and of the same
    architecture and vocabulary. `config` is that of the run's model, and `rows` where its tokens are, or will be.

    Raises:
        ConfigError: the first thing that does not fit.
    """
    student, package = start.student.record(Student), start.package.record(Package)
    stored = None if student is None or package is None else student.files.get(Student.WEIGHTS)
    there = stored is not None and stored.sha256 == start.sha256 and start.student.holds(Student.WEIGHTS, stored)
    if student is None or package is None or not there:
        raise ConfigError(
            f"{KNOB} is {start.version}, and its latent weights are not, or no longer, in the store: there is nothing "
            f"of them at {start.student.uri}. Set resources.storage_uri to the store that it was trained in, name a "
            f"version whose weights are kept, or leave {KNOB} out."
        )
    packed = FinishedStep(package, start.package)
    with start.package.scratch_folder() as folder:
        for file in (name for name in package.files if not name.endswith(".safetensors")):
            shutil.copyfile(packed.local(file), folder / Path(file).name)
        own, theirs = _settings(run, config), _settings(run, read_config(folder))
        if differing := sorted(name for name in own.keys() & theirs.keys() if own[name] != theirs[name]):
            listed = ", ".join(f"{name} is {own[name]} here and {theirs[name]} there" for name in differing)
            raise ConfigError(
                f"{KNOB} is {start.version}, whose weights are of another architecture than model.source: {listed}. "
                f"Use a model.source of that architecture, or leave {KNOB} out."
            )
        if student.inputs[Tokens.stage] != rows.key:
            _check_vocabulary(run, start, Path(folder), rows, tokens)
    return student


def _settings(run: PinnedRun, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of an architecture that decide what its weights mean."""
    from transformers import PreTrainedConfig

    common = {*PreTrainedConfig().to_dict()} - {"model_type"}
    if run.model is None:  # the tokenizer decides it
        common.add("vocab_size")
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in fields.items()
        if name not in common and not any(part in name for part in WITHOUT_MEANING)
    }


def _check_vocabulary(run: PinnedRun, start: Start, folder: Path, rows: StepDir, tokens: Tokens | None) -> None:
    """Raise ConfigError unless the run's tokenizer has the vocabulary of that in the folder."""
    words = None  # of a tokenizer that is yet to be learned, from other text than that of the version
    if run.tokenizer is not None:
        words = read_tokenizer(run.tokenizer.folder, run.tokenizer.gguf_file)
    elif tokens is not None:
        words = read_tokenizer(rows.folder(tokens.files, Tokens.FOLDER))
    if words is None or words.get_vocab() != read_tokenizer(folder).get_vocab():
        given = run.config.model.model_dump()["tokenizer"] or run.config.model.source
        learned = "" if run.tokenizer is not None else ", learned from other text"
        raise ConfigError(
            f"{KNOB} is {start.version}, whose weights know other tokens than those of model.tokenizer ({given}"
            f"{learned}). Set model.tokenizer to a folder with that version's, such as one that `bitmill pull "
            f"{start.version}` writes, or leave {KNOB} out."
        )


def check_quantization(run: PinnedRun, start: Start, student: Student) -> None:
    """Raise ConfigError unless the run quantizes as the version's student, given by its record, was trained to."""
    own, theirs = recipe_of(run.config.quant), student.recipe["quant"]
    for name in SAME:
        if own[name] != theirs[name]:
            raise ConfigError(
                f"quant.{name} is {json.dumps(own[name])}, and {start.version}, which {KNOB} names, was trained with "
                f"{json.dumps(theirs[name])}: its weights and scales are for that alone. Set quant.{name} to "
                f"{json.dumps(theirs[name])}, or leave {KNOB} out."
            )
