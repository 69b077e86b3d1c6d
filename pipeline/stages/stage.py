"""A stage as one value, what it is made of, and what it is given when it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.config.data import TrainBpe
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.config.training import Distill, Finetune
from pipeline.errors import ConfigError
from pipeline.execution.engine import Engine
from pipeline.models.blocks import angles_change_at
from pipeline.models.build import model_type_of, read_config
from pipeline.models.family import Family, family_with
from pipeline.provenance import provenance
from pipeline.sources.files import SourceFile
from pipeline.sources.models import ModelSource
from pipeline.store.keys import recipe_of
from pipeline.store.records import SPLITS, Advance, Overlap, Record, SplitName, StoredFile, TeacherCache, Tokens
from pipeline.store.step_store import FinishedStep, StepDir
from pipeline.tasks import task_of
from pipeline.tasks.task import Task
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.training.trainer import TrainingJob

if TYPE_CHECKING:  # which takes long to import, for those who only plan
    from transformers import PreTrainedConfig

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass(frozen=True)
class Start:
    """A registered version whose latent weights a student starts from: what it is, and where its steps lie."""

    version: str  # name/version
    sha256: str  # of the latent weights
    student: StepDir
    package: StepDir


@dataclass(frozen=True)
class PinnedRun:
    """A configuration with every source pinned by content: all that keys are made of."""

    config: Config
    text: dict[SplitName, tuple[SourceFile, ...]]
    model: ModelSource | None  # None: an architecture, to be trained from the beginning
    tokenizer: ModelSource | None  # None: learned from the training split
    family: Family
    start: Start | None = None  # None: students start from the teacher's weights

    def with_config(self, config: Config, start: Start | None) -> PinnedRun:
        """Return the run with another configuration of the same model, text and task, and what its student starts
        from."""
        run = replace(self, config=config, start=start)
        vars(run)["tokens_recipe"] = self.tokens_recipe  # made once, for it names every file
        return run

    @cached_property
    def tokens_recipe(self) -> dict[str, Any]:
        """Return what the rows depend on: the content of the text, the tokenizer, the task."""
        tokenizer, pinned = self.config.model.tokenizer, self.tokenizer.content if self.tokenizer else {}
        recipe: dict[str, Any] = {
            "data": self._text_recipe(),
            "tokenizer": tokenizer.model_dump() if isinstance(tokenizer, TrainBpe) else {"content": pinned},
            "task": {knob: v for knob, v in recipe_of(self.config.task).items() if knob != "packing"},
        }
        if self.packed:
            recipe["packed"] = True
        if self.family.encoder_decoder and self.model is not None:  # what a pretrained decoder reads first
            if not hasattr(self.settings, "decoder_start_token_id"):
                raise ConfigError(
                    f"model.source: the config.json of {self.config.model.source} has no decoder_start_token_id, which "
                    "its decoder reads first: set it there; T5's is the padding token, 0."
                )
            recipe["decoder_start"] = self.settings.decoder_start_token_id
        return recipe

    @property
    def packed(self) -> bool:
        """Tell whether documents share rows: a model of no family, or one that goes by the name of another, may have
        more that leads from a token to the next than attention, which a mask keeps apart; angles that change with the
        length of a pass would be others than a document has by itself."""
        source = self.config.model.source if self.model is None else self.model.folder
        gguf_file = None if self.model is None else self.model.gguf_file
        known = self.config.task.packs and family_with("blocks", model_type_of(source, gguf_file)) is not None
        return known and self.config.task.block_length <= (angles_change_at(self.settings) or math.inf)

    @cached_property
    def task(self) -> Task:
        """Return the task that the configuration names."""
        return task_of(self.tokens_recipe)

    @cached_property
    def settings(self) -> PreTrainedConfig:
        """Return the model's own configuration."""
        if self.model is None:
            return read_config(self.config.model.source)
        return read_config(self.model.folder, self.model.gguf_file)

    @property
    def hidden(self) -> int:
        """Return the width of the model's hidden states."""
        return int(self.settings.hidden_size)

    @cached_property
    def vocabulary(self) -> int:
        """Return how many tokens the model tells apart."""
        tokenizer = self.config.model.tokenizer
        if self.model is None and isinstance(tokenizer, TrainBpe):
            return tokenizer.train_bpe
        if self.model is None and self.tokenizer is not None:
            return len(read_tokenizer(self.tokenizer.folder, self.tokenizer.gguf_file))
        return int(self.settings.vocab_size)

    @property
    def estimated_rows(self) -> int:
        """Return about how many rows of training text there are."""
        data = self.config.data
        held_out = sum(data.holdout for given in (data.validation, data.test) if given is None)
        text_bytes = sum(file.text_bytes * file.weight for file in self.text["train"]) * data.sample * (1 - held_out)
        return self.task.estimated_rows(text_bytes)

    def _text_recipe(self) -> dict[str, Any]:
        """Return the content of each split's files; where they lie stays out."""
        recipe = recipe_of(self.config.data)
        for split, name in zip(SPLITS, ("source", "validation", "test"), strict=True):
            del recipe[name]
            files = self.text.get(split)
            recipe[split] = [_file_recipe(file) for file in files] if files else None
        return recipe


def _file_recipe(file: SourceFile) -> dict[str, Any]:
    weighted = {} if file.weight == 1 else {"weight": file.weight}
    return {"content": file.content, "format": file.format, **weighted}


@dataclass(frozen=True)
class StepJob:
    """What a step's workers are told; small and picklable. `locations` says where pinned sources lie; it never enters
    the key."""

    recipe: dict[str, Any]
    inputs: dict[str, FinishedStep[Any]]
    dir: StepDir
    resources: Resources
    locations: dict[str, Any]

    @property
    def task(self) -> Task:
        """Return the task that the tokens were made for."""
        return task_of(self.input(Tokens).record.recipe)

    def input(self, kind: type[R]) -> FinishedStep[R]:
        """Return an earlier step by the kind of its record."""
        step = self.inputs[kind.stage]
        if not isinstance(step.record, kind):
            raise TypeError(f"the input {kind.stage} is a {type(step.record).__name__}")
        return step


@dataclass(frozen=True)
class Step(StepJob):
    """One step about to run, on the driver."""

    version: int
    engine: Engine
    advance: Advance

    @property
    def job(self) -> StepJob:
        """Return what the step's workers are told."""
        return StepJob(self.recipe, self.inputs, self.dir, self.resources, self.locations)

    def identity(self) -> dict[str, Any]:
        """Return the fields that every record begins with."""
        return {
            "key": self.dir.key,
            "stage_version": self.version,
            "recipe": self.recipe,
            "inputs": {name: step.record.key for name, step in self.inputs.items()},
            "provenance": provenance(),
        }


Inputs = Callable[[PinnedRun], tuple[type[Record], ...]]


def always(*kinds: type[Record]) -> Inputs:
    """Return the inputs of a stage that reads the same records in every run."""
    return lambda run: kinds


@dataclass(frozen=True)
class Stage(Generic[R_co]):
    """A stage: the record it makes, those it reads, what of a configuration changes its answer, and its work.

    `recipe` enters the step's key with `version` and the keys of the inputs; `locations` says where pinned sources
    lie, and enters none. `check` raises ConfigError, before any worker starts, for what cannot work, and returns what
    splits share where it finds that out.
    """

    record: type[R_co]
    inputs: Inputs
    recipe: Callable[[PinnedRun], dict[str, Any]]
    run: Callable[[Step], R_co]
    locations: Callable[[PinnedRun], dict[str, Any]] = lambda run: {}  # of a stage that reads nothing but records
    check: Callable[[PinnedRun, StepDir, Tokens | None], Overlap | None] = lambda run, step_dir, tokens: None
    version: int = 1
    shared: bool = False  # by all students of a teacher
    repairs: bool = False  # makes a single damaged shard again
    unit: str = ""  # of its progress

    @property
    def name(self) -> str:
        """Return the stage's name, which is that of its record's folder."""
        return self.record.stage


def upload_folder(step_dir: StepDir, folder: Path, prefix: str) -> dict[str, StoredFile]:
    """Store the files of a local folder, each as its name after the prefix."""
    return {prefix + path.name: step_dir.upload(prefix + path.name, path) for path in sorted(folder.iterdir())}


def training_job(
    job: StepJob, recipe: Finetune | Distill, cache: FinishedStep[TeacherCache] | None = None
) -> TrainingJob:
    """Return the training job of a step that trains on its tokens."""
    tokens = job.input(Tokens)
    train, validation = tokens.record.splits["train"].shards, tokens.record.splits["validation"].shards
    return TrainingJob(recipe, job.dir, tokens.dir, train, validation, job.resources, cache, job.task)
