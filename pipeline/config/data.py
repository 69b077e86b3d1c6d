"""What the text is, what the model is and is for, and how it is scored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config.base import Closed, Positive
from pipeline.credentials import taking_none
from pipeline.metrics import LM_EVAL, named_by_lm_eval


class TrainBpe(Closed):
    """A byte-level BPE of this many tokens, learned from the training split."""

    train_bpe: Annotated[int, Field(ge=257, le=1_000_000)]


class Model(Closed):
    """`source`: a local Hugging Face directory, a local FILE.gguf of an architecture that transformers reads, a hub id
    (`org/name@commit`), `python://smollm2-135m`, or an architecture such as {architecture: gpt2, n_layer: 4}.
    `tokenizer` is the source's own unless given: a directory, a FILE.gguf, a hub id, one to be learned, or
    `step://KEY`, what the step `tokenize` of that key, in the store, read or learned.

    `family` is by default that of the model's type; a decoder alone of no family is walked over, which the plan tells.

    Before anything starts a checkpoint's tensors are compared with the model's, and all its numbers are read once, for
    NaN and infinity, in about the time of a checksum, or of a GGUF file a second for some 100 million. Tensors that the
    model of its config.json, or of the file's settings, does not take are refused, or with `unused_tensors: drop` left
    out."""

    source: str | dict[str, Any]
    tokenizer: str | TrainBpe | None = None
    family: str = "auto"
    unused_tensors: Literal["refuse", "drop"] = "refuse"

    @model_validator(mode="after")
    def _an_architecture_needs_more(self) -> Model:
        if isinstance(self.source, dict):
            if "architecture" not in self.source:
                raise ValueError("model.source as a mapping needs the key `architecture`, such as gpt2 or llama")
            if self.tokenizer is None:
                raise ValueError(
                    "model.source is an architecture and brings no tokenizer; set model.tokenizer to a directory, "
                    "a hub id or {train_bpe: 4096}"
                )
        elif isinstance(self.tokenizer, TrainBpe):
            raise ValueError(
                "model.tokenizer: {train_bpe} gives a new vocabulary, which the weights of model.source do not know; "
                "use it with {architecture: ...} only"
            )
        return self


class TaskSettings(Closed):
    """What the model is for, and how long its rows are, in tokens.

    `language_modeling`: text is cut into rows of `block_length` without overlap.
    `next_utterance`: conversations; a row is a context with `candidates` replies, one of them the true one (training
    rows: `train_candidates`), each within `block_length`.
    `chat`: conversations as the tokenizer's chat template writes them, of one longer than `block_length` its beginning;
    learned, distilled and scored on what the assistant says (`loss_on: all`: on all of it). With `packing` a row holds
    as many as fit, none of which sees another; without it, and for a model of no family, each has a row of its own.
    `summarization`: documents cut to `source_length`, summaries to `target_length`; the model has an encoder.
    """

    name: Literal["language_modeling", "chat", "next_utterance", "summarization"] = "language_modeling"
    block_length: Annotated[int, Field(ge=2)] = 512
    candidates: Annotated[int, Field(ge=2)] = 20
    train_candidates: Annotated[int, Field(ge=2)] = 4
    source_length: Annotated[int, Field(ge=4)] = 512
    target_length: Annotated[int, Field(ge=4)] = 64
    loss_on: Literal["assistant", "all"] = "assistant"
    packing: bool = True

    @model_validator(mode="after")
    def _of_this_task(self) -> TaskSettings:
        valid = [knob for knob, names in TASK_OF.items() if self.name in names]
        for knob, value in self.changed(*TASK_OF):
            if knob not in valid:
                refused = f"task.{knob} is {value}, and the task {self.name} has no such setting"
                raise ValueError(f"{refused}; valid: {', '.join(valid)}")
        if self.name == "next_utterance" and self.block_length < 8:
            least = "a context with a reply needs at least 8 tokens"
            raise ValueError(f"task.block_length is {self.block_length}; {least}")
        return self

    @property
    def packs(self) -> bool:
        """Tell whether documents are to share rows."""
        return self.packing and self.name in TASK_OF["packing"]


TASK_OF = {
    "block_length": ("language_modeling", "chat", "next_utterance"),
    "candidates": ("next_utterance",),
    "train_candidates": ("next_utterance",),
    "loss_on": ("chat",),
    "packing": ("chat",),
    "source_length": ("summarization",),
    "target_length": ("summarization",),
}


class Source(Closed):
    """One of several sources, or one that needs more than a path. Of a data set, a folder or `hf://org/name@commit`,
    `config` and `split` name what is read; left out, the only config, and the split of the knob's name.

    `weight` is how often training text is read: 2 gives each of its documents two times, 0.5 half of the documents, by
    their hashes (of a .txt file that is cut into blocks its beginning). What is held out is so before and counts once.
    """

    path: str
    config: str | None = None
    split: str | None = None
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0

    @field_validator("path")
    @classmethod
    def _no_credentials(cls, uri: str) -> str:
        return taking_none(uri)


def _kind(given: Any) -> str:
    """Tell what of the three a source is, so that an error is of that one."""
    if isinstance(given, list | tuple):
        return "<list>"
    return "<source>" if isinstance(given, dict | Source) else "<path>"


One = Annotated[Annotated[str, Tag("<path>")] | Annotated[Source, Tag("<source>")], Discriminator(_kind)]
Sources = Annotated[
    Annotated[str, Tag("<path>")]
    | Annotated[Source, Tag("<source>")]
    | Annotated[tuple[One, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind),
]


class Data(Closed):
    """Where text comes from: a path, or a list of paths and sources {path, config, split, weight}. A path is a glob of
    txt, jsonl, json (lines or an array), csv, tsv, parquet or arrow files, each also as .gz, .bz2, .xz, .zst or .zip;
    the folder of a data set, also one that `save_to_disk` wrote; `s3://`, `gs://` or `az://bucket/glob`; a data set of
    the hub, `hf://org/name@commit`, or its files, `hf://org/name@commit/glob`; `python://chitchat`, `python://aclsum`
    (of which /train, /validation and /test are parts).

    Workers share a file of text, jsonl or parquet; one of another format, or compressed, one worker reads from its
    beginning to its end, and none holds a file in memory. A line or a document has at most 64 MiB.

    `unit: document` puts end-of-text after each document (a jsonl or parquet row, a paragraph of a txt file);
    `unit: line` takes rows or lines as running text, of which no rows can be held out or sampled, only txt.

    Without `validation` or `test`, `holdout` of `source` each. Rows are held out by document, chosen by content hash;
    rows that belong together stay so: those of one text to be summarized, all aspects of a paper, and, where
    `candidates_column` is given, those with the same first turn and persona. Paragraphs of a txt file are no such
    documents, for they tell one story: of txt files whole ones are held out, in the order of their hashes up to
    `holdout` of the bytes, and where that would give half of it or less, or twice or more, a block of each, validation
    at its beginning and test after it, cut at blank lines (`unit: line`: at any). `sample` takes that share of
    `source`, by the same hashes, or of a block's file its beginning.

    A file that two splits hold is refused, and so is a `validation` or `test` of which more than half the documents
    (of `unit: line`: lines of 32 characters or more) are in another split; fewer are counted, and the run says it.

    Summarization reads `text_column` and `summary_column`. Next utterance reads the turns of a conversation from
    `text_column`, a list or one turn a line, and puts the sentences of `persona_column` before them; with
    `candidates_column`, a row is one example: the turns so far, and candidate replies of which the last is true.
    Chat reads `messages_column`, a list of {role, content, ...} or of ShareGPT's {from, value}, in text its JSON, and
    from `tools_column` the tools that the assistant may call.
    """

    source: Sources
    validation: Sources | None = None
    test: Sources | None = None
    unit: Literal["document", "line"] = "document"
    text_column: str = "text"
    holdout: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0
    summary_column: str = "summary"
    candidates_column: str | None = None
    persona_column: str | None = None
    messages_column: str = "messages"
    tools_column: str | None = None

    @field_validator("source", "validation", "test")
    @classmethod
    def _no_credentials(cls, given: Sources | None) -> Sources | None:
        for path in given if isinstance(given, tuple) else (given,):
            if isinstance(path, str):  # a source has looked at its own
                taking_none(path)
        return given

    @field_validator("validation", "test")
    @classmethod
    def _no_weight(cls, given: Sources | None) -> Sources | None:
        if weight := next((source.weight for source in _each(given) if source.weight != 1), None):
            raise ValueError(f"a weight ({weight:g}) is of training text, in data.source; what measures is read once")
        return given

    def sources(self, split: str) -> tuple[Source, ...]:
        """Return the sources of a split's own; none where it is held out of those of training."""
        return _each(self.source if split == "train" else getattr(self, split))


def _each(given: Sources | None) -> tuple[Source, ...]:
    several = given if isinstance(given, tuple) else () if given is None else (given,)
    return tuple(Source(path=source) if isinstance(source, str) else source for source in several)


def _checked_suite(name: str) -> str:
    if not re.fullmatch(rf"generated|{LM_EVAL}:[A-Za-z0-9_./-]+", name):
        raise ValueError(
            f"{name!r} is no suite; valid: generated, and {LM_EVAL}:TASK, where TASK is a task of lm-eval by name or "
            f"the path of its YAML file, of letters, digits, '_', '-', '.' and '/', such as {LM_EVAL}:arc_easy"
        )
    return name


Suite = Annotated[str, AfterValidator(_checked_suite)]


class Evaluate(Closed):
    """Generation on the validation and test splits, where the task generates: beam search over
    `generated_rows` rows of each, drawn by a hash of their content.

    `suites` measure the student and its teacher once more. `generated`: how far the student is from the teacher in text
    that the teacher writes after prompts of the validation split. `lm_eval:TASK`: a task of lm-eval, or the
    YAML file of one, which needs `pip install 'bitmill[eval]'` and the task's data on this machine, on the task's
    validation split; on its test split if it has no other, which is shown and chooses nothing. Of the task `chat` the
    model is asked by its tokenizer's chat template."""

    beams: Positive = 6
    generated_rows: Positive | None = None  # null: all
    suites: Annotated[tuple[Suite, ...], Field(exclude_if=lambda suites: not suites)] = ()

    @field_validator("suites")
    @classmethod
    def _each_once(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        if len({*suites}) < len(suites):
            raise ValueError(f"suites names one twice: {', '.join(suites)}")
        named = [named_by_lm_eval(suite.partition(":")[2], "") for suite in suites if suite.startswith(LM_EVAL)]
        if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
            raise ValueError(
                f"suites has tasks of one name, by which their metrics go ({', '.join(twice)}_METRIC): "
                f"{', '.join(suites)}; rename a file"
            )
        return suites
