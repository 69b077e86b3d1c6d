"""The closed schema of a run: unknown keys are refused by name, and everything downstream trusts it.

What changes the answer is a recipe and enters keys; `resources` never does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.quant.spec import (
    WEIGHT_WIDTHS,
    ActivationRange,
    AttentionOperands,
    BitWidths,
    Encoding,
    GammaInit,
    Granularity,
    QuantSpec,
    Ste,
)
from pipeline.records import Closed
from pipeline.schema import Data, Evaluate, Positive, Task

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
FloatType = Literal["float32", "float16", "bfloat16"]


class TrainBpe(Closed):
    """A byte-level BPE of this many tokens, learned from the training split."""

    train_bpe: Annotated[int, Field(ge=257, le=1_000_000)]


class Model(Closed):
    """`source`: a local Hugging Face directory, a hub id (`org/name@commit`), `python://smollm2-135m`, or an
    architecture such as {architecture: gpt2, n_layer: 4}. `tokenizer` is the source's own unless given."""

    source: str | dict[str, Any]
    tokenizer: str | TrainBpe | None = None
    family: Literal["auto", "gpt2", "llama", "bart"] = "auto"

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


class Training(Closed):
    """What the one training loop takes. Exactly one of `steps` and `epochs`; rates decay linearly to 1e-6."""

    steps: Positive | None = None
    epochs: Rate | None = None
    batch_size: Positive = 32
    lr: Rate = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NotNegative = 0.0
    clip_norm: Rate | None = 1.0  # of the weights' gradient; null: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: Positive = 100  # optimizer steps between validations; the best one ships
    eval_rows: Positive = 512  # rows of the validation split that choose the best step
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Finetune(Training):
    """Full-precision training of the teacher; `dropout` null keeps the model's own."""

    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Distill(Training):
    """Quantization-aware distillation (Tao et al. 2022); defaults are the paper's."""

    gamma_lr: Rate = 1e-3
    contrast_weight: NotNegative = 0.1
    temperature: Rate = 0.1
    negatives: Positive = 64
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Cache(Closed):
    """`states`: hidden states are stored; `online`: the teacher runs in each step; `auto`: the cheaper, by estimate."""

    mode: Literal["states", "online", "auto"] = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_kl_nats: NotNegative = 1e-4


class Quant(Closed):
    """How the student is quantized, and in which dtypes scales and all other tensors ship."""

    bits: str = "2-2-8"
    quantizer: Literal["quantgpt"] = "quantgpt"
    granularity: Granularity = "tensor"
    gamma_init: GammaInit = "auto"
    ste: Ste = "clipped"
    activation_range: ActivationRange = "token"
    attention: AttentionOperands = "none"
    overrides: dict[str, int] = {}
    scale_dtype: FloatType = "float32"
    rest_dtype: FloatType = "float32"

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: str) -> str:
        return str(BitWidths.parse(bits))

    @field_validator("overrides")
    @classmethod
    def _known_overrides(cls, overrides: dict[str, int]) -> dict[str, int]:
        for pattern, bits in overrides.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"overrides: {pattern!r} is not a regular expression: {error}") from error
            if bits not in WEIGHT_WIDTHS:
                raise ValueError(
                    f"overrides[{pattern!r}]: {bits} bits are not offered; valid: {', '.join(map(str, WEIGHT_WIDTHS))}"
                )
        return overrides

    def spec(self) -> QuantSpec:
        return QuantSpec(
            bits=BitWidths.parse(self.bits),
            granularity=self.granularity,
            gamma_init=self.gamma_init,
            ste=self.ste,
            activation_range=self.activation_range,
            attention=self.attention,
            overrides=tuple(self.overrides.items()),
        )


class Pack(Closed):
    encoding: Encoding = "dense"


class Gate(Closed):
    """A student that fails the gate is kept but not registered."""

    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None


class Register(Closed):
    name: Name | None = None  # the config's own name unless given
    gate: Gate = Gate()


class Resources(Closed):
    """What never changes the answer, up to float order: places, workers, batches of a pass.

    One exception: with dropout, which only finetune has, the masks differ with workers and micro_batch.
    """

    storage_uri: str = "./bitmill-store"
    tracking_uri: str | None = None
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = ""
    ray_address: str | None = None
    workers: Annotated[int, Field(ge=0)] = 1  # 0: everything in this process, without Ray
    cpus_per_worker: Rate = 1
    gpus_per_worker: NotNegative = 0
    micro_batch: Positive = 8  # rows a worker passes through the model at once while training
    inference_batch: Positive = 16  # rows of a pass of the cache and of the evaluation
    activation_checkpointing: bool = False
    checkpoint_steps: Positive = 100
    max_failures: Annotated[int, Field(ge=0)] = 3  # worker losses that one training run survives
    local_cache_dir: str | None = None
    cache_gib_per_teacher_hour: Rate = 50  # cache.mode auto: GiB of states worth one hour of the teacher

    @field_validator("storage_uri")
    @classmethod
    def _plain_directory(cls, uri: str) -> str:
        return uri.removeprefix("file://")


class Config(Closed):
    """One YAML a run."""

    name: Name
    model: Model
    task: Task = Task()
    data: Data
    finetune: Finetune | None = None
    cache: Cache = Cache()
    quant: Quant = Quant()
    distill: Distill
    evaluate: Evaluate = Evaluate()
    pack: Pack = Pack()
    register_: Register = Field(default=Register(), alias="register")
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        bits = [self.quant.spec().bits.weights, self.quant.spec().bits.embedding, *self.quant.overrides.values()]
        if self.pack.encoding == "base3" and not set(bits) <= {2, 32}:
            raise ValueError(
                f"pack.encoding: base3 holds ternary codes only, and quant.bits is {self.quant.bits}; "
                "use encoding: dense, or 2 bits throughout"
            )
        if self.task.name != "language_modeling" and self.data.unit == "line":
            raise ValueError(
                f"data.unit: line is running text, which the task {self.task.name} cannot use; leave it out"
            )
        if isinstance(self.model.source, dict) and self.finetune is None:
            raise ValueError("model.source is an architecture without weights; add a finetune section to train it")
        for section, training in (("finetune", self.finetune), ("distill", self.distill)):
            if training is not None and training.batch_size < self.resources.workers:
                raise ValueError(
                    f"{section}.batch_size is {training.batch_size}, fewer rows than resources.workers "
                    f"({self.resources.workers}); raise one or lower the other"
                )
        return self


def load_config(
    path: str | Path, overrides: list[str] | None = None, resources: dict[str, str] | None = None
) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), validate.

    `resources` holds values for that section where neither the file nor an override sets them.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"The configuration {path} is not a mapping of sections such as name, model, data.")
    for override in overrides or []:
        _apply(fields, override)
    if isinstance(fields.setdefault("resources", {}), dict):
        fields["resources"] = {**(resources or {}), **fields["resources"]}
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("\n".join([f"The configuration {path} is not valid.", *_explain(error)])) from error


def _apply(fields: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as distill.steps=200")
    *sections, key = path.split(".")
    section: Any = fields
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {name} is a value, not a section")
    try:
        section[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = ", ".join(_valid_keys(problem["loc"][:-1]))
            lines.append(f"  {path}: unknown key. Valid keys: {valid}")
        elif problem["type"] == "value_error":
            lines.append(f"  {path + ': ' if path else ''}{problem['ctx']['error']}")
        else:
            given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
            lines.append(f"  {path}: {problem['msg']}{given}")
    return lines


def _valid_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for part in loc:
        for name, field in section.model_fields.items():
            if part in (name, field.alias):
                candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
                section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return sorted(field.alias or name for name, field in section.model_fields.items())
