"""What stages hand on: one frozen record each, which `step_store` writes last, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pipeline.config.base import Closed
from pipeline.errors import RunError

SCHEMA_VERSION = 1
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
Point = dict[str, float]  # of a curve: "step" and values in nats, by name
ROWS = "rows/"  # the folder of shards
BothMetrics = dict[Literal["teacher", "student"], dict[str, float]]


class Advance(Protocol):
    """A function told how far a stage is: done of how many, a word on how it goes, points since the last call."""

    def __call__(self, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None: ...


def never() -> bool:
    """Tell that nobody announced an end."""
    return False


class Checksum(Closed):
    """The size and SHA-256 of a file."""

    bytes: int
    sha256: str


class StoredFile(Checksum):
    """A file of a step: its checksum, and the fencing token of the attempt that wrote it."""

    fence: int

    def place(self, name: str) -> str:
        """Return where the file of this name lies, below the folder of its step."""
        return place_of(name, self.fence)


def place_of(name: str, fence: int | None) -> str:
    """Return where an attempt keeps the file of a name, below the folder of its step."""
    return f"{fence}/{name}"


def attempt_of(place: str) -> int:
    """Return the token of the attempt that keeps what lies at a place, or is the folder; 0: it is no attempt's."""
    first = place.partition("/")[0]
    return int(first) if first.isdecimal() else 0


Precision = Literal["fp32", "bf16"]


class Shard(Closed):
    """A shard of rows, and the file that holds it."""

    name: str
    rows: int
    tokens: int
    file: StoredFile


class Split(Closed):
    """The shards of one split, in order, and the UTF-8 bytes of its text. `shared` says how many of its documents an
    earlier split, by name, holds too; of `unit: line`, documents are lines that are not short."""

    shards: tuple[Shard, ...] = ()
    text_bytes: int = 0
    documents: int = 0
    shared: dict[SplitName, int] = {}

    @property
    def rows(self) -> int:
        """Count the rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Count the tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)


class Overlap(Closed):
    """How many documents of each split an earlier one, by name, holds too, and of how many; an estimate where only the
    share `compared` of all documents was compared."""

    shared: dict[SplitName, dict[SplitName, int]]
    documents: dict[SplitName, int]
    compared: float = 1.0


class Record(Closed):
    """Base of all records: where it comes from, and the files that belong to it."""

    stage: ClassVar[str]
    FOLDER: ClassVar[str] = ""  # of its files that belong together
    schema_version: int = SCHEMA_VERSION
    key: str
    stage_version: int
    recipe: dict[str, Any]
    inputs: dict[str, str]
    provenance: dict[str, str]
    files: dict[str, StoredFile] = {}

    @property
    def stored(self) -> dict[str, StoredFile]:
        """Return every file that belongs to the step, shards among them."""
        return self.files

    def to_json(self) -> bytes:
        """Return the bytes that `read_record` parses."""
        return json.dumps({"stage": self.stage, **self.model_dump(mode="json")}, indent=1).encode()


class Tokens(Record):
    """Text as fixed-width rows of token ids, with the tokenizer."""

    stage: ClassVar[str] = "tokenize"
    FOLDER: ClassVar[str] = "tokenizer/"
    vocabulary: int
    end_of_text: int | None
    padding: int | None = None  # where the task needs a padding token
    splits: dict[SplitName, Split]
    compared: float = 1.0  # share of the documents by which those that splits share were counted

    @property
    def stored(self) -> dict[str, StoredFile]:
        """Return the files of the tokenizer and of the rows."""
        return self.files | {shard.name: shard.file for split in self.splits.values() for shard in split.shards}

    @property
    def overlap(self) -> Overlap:
        """Return how many documents splits share."""
        splits = self.splits.items()
        shared, documents = ({n: s.shared for n, s in splits}, {n: s.documents for n, s in splits})
        return Overlap(shared=shared, documents=documents, compared=self.compared)


class Trained(Record):
    """Weights that the training loop made, the best on validation, and how it went (nats per token)."""

    parameters: int
    steps: int
    best_step: int
    validation_nats: float | None


class Teacher(Trained):
    """The full-precision model that students learn from: a checkpoint as it is, or trained on the task's text."""

    stage: ClassVar[str] = "finetune"
    FOLDER: ClassVar[str] = "model/"
    fp32_bytes: int
    family: str
    hidden: int


class Student(Trained):
    """The quantized model that was distilled from the teacher."""

    stage: ClassVar[str] = "distill"
    WEIGHTS: ClassVar[str] = "weights.safetensors"  # latent, to train on from
    FROZEN: ClassVar[str] = "frozen.safetensors"  # what is scored and ships
    family: str
    digest: str  # of the frozen tensors


class TeacherCache(Record):
    """The teacher's last hidden states beside the training rows, or tokens drawn from its distributions, some `draws`
    a position; empty when the teacher runs online."""

    stage: ClassVar[str] = "cache"
    mode: Literal["states", "logits", "online"]
    dtype: str  # of a value that is stored: of a state or a token
    draws: int | None = None
    hidden: int
    shards: tuple[Shard, ...] = ()
    bytes: int = 0
    # KL(teacher in fp32 || teacher from cache, in a step, or that tokens were drawn from), nats per token, on a probe
    kl_nats: float | None = None
    precision: Precision = "fp32"  # of the teacher's pass and of its head in a step: bf16 on a GPU

    @property
    def stored(self) -> dict[str, StoredFile]:
        """Return the files of what is cached."""
        return self.files | {shard.name: shard.file for shard in self.shards}


class Sensitivity(Record):
    """What quantizing one module alone costs, untrained: `kl_nats[module][width]`, KL from the teacher per token."""

    stage: ClassVar[str] = "sensitivity"
    tokens: int  # that were looked at
    kl_nats: dict[str, dict[int, float]]


class Evaluation(Record):
    """Scores of the frozen student and the teacher on the test split, and on the validation split, which chooses."""

    stage: ClassVar[str] = "evaluate"
    DOCUMENTS: ClassVar[str] = "documents.json"  # of the test split: sums of each
    ROWS: ClassVar[str] = "rows.json"  # of the test split, where the task measures rows
    SUITES: ClassVar[str] = "suites.json"  # of `evaluate.suites`, if any: numbers, tables, and the split of each
    protocol: str
    digest: str
    teacher: dict[str, float]
    student: dict[str, float]
    validation: BothMetrics


class Contest(Record):
    """A champion scored on the test rows of a challenger, and the metrics of both over all of these."""

    stage: ClassVar[str] = "contest"
    DOCUMENTS: ClassVar[str] = "documents.json"
    ROWS: ClassVar[str] = "rows.json"
    champion: dict[str, float]
    challenger: dict[str, float]


class Size(Closed):
    """Bytes of the teacher and of the packed model, and their ratio: honest ones, and as the paper counts."""

    teacher_bytes: int
    packed_bytes: int
    ratio: float
    paper_bytes: int
    paper_ratio: float

    @classmethod
    def of(cls, teacher_bytes: int, packed_bytes: int, paper_bytes: int) -> Size:
        """Return the bytes with their ratios."""
        return cls(
            teacher_bytes=teacher_bytes,
            packed_bytes=packed_bytes,
            ratio=teacher_bytes / packed_bytes,
            paper_bytes=paper_bytes,
            paper_ratio=teacher_bytes / paper_bytes,
        )


class Package(Record):
    """The packed model, as a folder of files."""

    stage: ClassVar[str] = "pack"
    FOLDER: ClassVar[str] = "package/"
    digest: str
    size: Size


class ModelVersion(Record):
    """The version of a registered model that holds the package."""

    stage: ClassVar[str] = "register"
    name: str
    version: int
    aliases: tuple[str, ...] = ()
    run_id: str
    model_id: str


class Trial(Closed):
    """A trial of a sweep: its values, and what became of it. `key` is that of its registration, as of any run,
    `seconds` from start to end on its workers, `last` the last point of validation it reported while it trained;
    `teacher` and `student` are metrics of the test split, which nothing is chosen by."""

    key: str
    bits: str
    values: dict[str, Any]
    status: Literal["running", "done", "stopped", "failed"]
    teacher: dict[str, float] = {}
    student: dict[str, float] = {}
    validation: BothMetrics = {}
    last: dict[str, float] = {}
    size: Size | None = None
    version: dict[str, Any] | None = None  # name, version and aliases, once it is registered
    failure: str = ""
    seconds: float = 0.0
    workers: int = 1
    step_keys: dict[str, str] = {}  # by stage

    @property
    def worker_seconds(self) -> float:
        """Return the seconds of all workers together."""
        return self.seconds * self.workers


class SweepRecord(Record):
    """A finished sweep; `front` holds the keys of trials that no other beats in all objectives, on validation."""

    stage: ClassVar[str] = "sweep"
    name: str
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    front: tuple[str, ...]


R = TypeVar("R", bound=Record)


def read_record(data: bytes, kind: type[R], place: str) -> R:
    """Parse a stored record. Raises RunError: the record was written by a newer bitmill, or is damaged."""
    try:
        fields = json.loads(data)
        version, stage = fields["schema_version"], fields.pop("stage")
        newer = not isinstance(version, int) or version > SCHEMA_VERSION
        if not newer and stage == kind.stage:
            return kind.model_validate(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"The record {place} is damaged ({error}). Delete it to run the step again.") from error
    if newer:
        raise RunError(
            f"The record {place} has schema_version {version}; this bitmill reads up to {SCHEMA_VERSION}. "
            "Upgrade bitmill, or use another resources.storage_uri."
        )
    raise RunError(f"The record {place} is of stage {stage!r} where {kind.stage!r} belongs.")
