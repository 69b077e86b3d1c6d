"""The closed schema of a run: unknown keys are refused by name, and everything downstream trusts it.

What changes the answer is a recipe and enters keys; `resources` never does.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from pipeline.config.data import Data, Evaluate, NotNegative, Positive, Rate, Task
from pipeline.config.presets import PRESETS, PresetName, filled
from pipeline.config.resources import Resources
from pipeline.config.sweep import Sweep
from pipeline.distill.negatives import NegativesFrom
from pipeline.quant.spec import (
    TAKES,
    TERNARY_ONLY,
    UNQUANTIZED,
    WEIGHT_WIDTHS,
    ActivationRange,
    AttentionOperands,
    BitWidths,
    Encoding,
    GammaGradient,
    GammaInit,
    Granularity,
    Positions,
    QuantizerName,
    QuantSpec,
    Ste,
    grid,
    levels_of,
)
from pipeline.store.records import Closed
from pipeline.training.schedule import Schedule

Beta = Annotated[float, Field(ge=0, lt=1)]
FadeIn = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
OptimizerName = Literal["adam", "muon"]
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
    """What the one training loop takes. Exactly one of `steps` and `epochs`; rates decay by `schedule` to 1e-6.

    `lr` is Adam's; the scales say by what it is multiplied for some parameters. With `optimizer: muon` the matrices of
    the layers are moved by Muon instead, by about `muon_lr` times their own root mean square a step."""

    steps: Positive | None = None
    epochs: Rate | None = None
    batch_size: Positive = 32
    lr: Rate = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NotNegative = 0.0
    schedule: Annotated[Schedule, Field(json_schema_extra={"added_with": "linear"})] = "linear"
    optimizer: Annotated[OptimizerName, Field(json_schema_extra={"added_with": "adam"})] = "adam"
    muon_lr: Annotated[Rate, Field(json_schema_extra={"added_with": 0.02})] = 0.02
    muon_momentum: Annotated[Beta, Field(json_schema_extra={"added_with": 0.6})] = 0.6
    betas: Annotated[tuple[Beta, Beta], Field(json_schema_extra={"added_with": [0.9, 0.999]})] = (0.9, 0.999)
    vector_lr_scale: Annotated[Rate, Field(json_schema_extra={"added_with": 1.0})] = 1.0  # norms, biases, positions
    embedding_lr_scale: Annotated[Rate, Field(json_schema_extra={"added_with": 1.0})] = 1.0  # and head
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

    @model_validator(mode="after")
    def _rates_of_muon(self) -> Training:
        for knob in ("muon_lr", "muon_momentum"):
            value = getattr(self, knob)
            if self.optimizer != "muon" and value != type(self).model_fields[knob].default:
                raise ValueError(
                    f"{knob} is {value:g} and has no effect, because optimizer is {self.optimizer}; leave it out, or "
                    "set optimizer: muon"
                )
        return self


class Finetune(Training):
    """Full-precision training of the teacher; `dropout` null keeps the model's own."""

    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Distill(Training):
    """Quantization-aware distillation (Tao et al. 2022); defaults are the paper's."""

    steps: Annotated[int, Field(ge=0)] | None = None  # 0: quantized and scored as it is
    gamma_lr: Rate = 1e-3
    fade_in: Annotated[FadeIn, Field(json_schema_extra={"added_with": 0.0})] = 0.0  # share of steps until quantized
    contrast_weight: NotNegative = 0.1
    temperature: Rate = 0.1
    negatives: Positive = 64
    negatives_from: Annotated[NegativesFrom, Field(json_schema_extra={"added_with": "teacher"})] = "teacher"
    contrast_layer: Annotated[int, Field(lt=0, json_schema_extra={"added_with": -1})] = -1  # -1: what the head reads
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def compared_layer(self) -> int:
        """Whose states are contrasted; the last where none are."""
        return self.contrast_layer if self.contrast_weight > 0 else -1

    @model_validator(mode="after")
    def _another_row_to_contrast_with(self) -> Distill:
        if self.negatives_from == "batch" and self.batch_size == 1 and self.contrast_weight:
            raise ValueError(
                "negatives_from is batch, and batch_size 1 has no other sequence; raise batch_size, or use negatives "
                "from teacher, student or vocabulary"
            )
        return self


class Cache(Closed):
    """`states`: hidden states are stored; `online`: the teacher runs in each step; `auto`: the cheaper, by estimate."""

    mode: Literal["states", "online", "auto"] = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_kl_nats: NotNegative = 1e-4


class Quant(Closed):
    """How the student is quantized, and in which dtypes scales and all other tensors ship."""

    bits: str = "2-2-8"
    quantizer: QuantizerName = "quantgpt"
    granularity: Granularity = "tensor"
    gamma_init: GammaInit = "auto"
    gamma_gradient: Annotated[GammaGradient, Field(json_schema_extra={"added_with": "both"})] = "both"
    ste: Ste = "auto"
    activation_range: ActivationRange = "token"
    attention: AttentionOperands = "none"
    overrides: dict[str, int] = {}
    scale_dtype: FloatType = "float32"
    rest_dtype: FloatType = "float32"
    positions: Annotated[Positions | None, Field(json_schema_extra={"added_with": None})] = None  # null: as rest_dtype

    @field_validator("overrides", mode="before")
    @classmethod
    def _pairs_in_order(cls, overrides: Any) -> Any:
        pairs = isinstance(overrides, list | tuple) and all(
            isinstance(p, list | tuple) and len(p) == 2 for p in overrides
        )
        return dict(overrides) if pairs else overrides

    @field_serializer("overrides")
    def _order_counts(self, overrides: dict[str, int]) -> Any:
        """Pairs, where there are several: the first match wins, and a mapping's order would not enter the key."""
        return overrides if len(overrides) < 2 else [list(pair) for pair in overrides.items()]

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

    @model_validator(mode="after")
    def _options_of_the_quantizer(self) -> Quant:
        for option, default in (("gamma_init", "auto"), ("gamma_gradient", "both"), ("ste", "auto")):
            value, takers = getattr(self, option), TAKES[option]
            if value not in (default, "one") and self.quantizer not in takers:
                raise ValueError(
                    f"{option} is {value}, which the quantizer {self.quantizer} does not take; leave it out, or use "
                    f"one of {', '.join(takers)}"
                )
        return self

    @model_validator(mode="after")
    def _ternary_where_it_must_be(self) -> Quant:
        wide = [bits for bits in self.weight_widths() if bits not in (2, UNQUANTIZED)]
        if self.quantizer in TERNARY_ONLY and wide:
            raise ValueError(
                f"quantizer {self.quantizer} gives ternary weights only, and bits are {self.bits} with overrides "
                f"{self.overrides}; use 2 (or 32) bits throughout, or another quantizer"
            )
        return self

    @model_validator(mode="after")
    def _activations_to_quantize(self) -> Quant:
        if BitWidths.parse(self.bits).activations == UNQUANTIZED:
            for knob, default in (("activation_range", "token"), ("attention", "none")):
                if getattr(self, knob) != default:
                    raise ValueError(
                        f"{knob} is {getattr(self, knob)} and has no effect, because bits {self.bits} leave "
                        "activations as they are; leave it out, or use 8 bits for activations"
                    )
        return self

    def weight_widths(self) -> list[int]:
        bits = BitWidths.parse(self.bits)
        return [bits.weights, bits.embedding, *self.overrides.values()]

    @property
    def ternary(self) -> bool:
        """Whether all that is quantized has three levels."""
        levels = levels_of(self.quantizer)
        return all(bits == UNQUANTIZED or grid(levels, bits).ternary for bits in self.weight_widths())

    def spec(self) -> QuantSpec:
        own = {"bits": BitWidths.parse(self.bits), "overrides": tuple(self.overrides.items())}
        return QuantSpec(**{field.name: getattr(self, field.name) for field in fields(QuantSpec)} | own)


class Pack(Closed):
    encoding: Encoding = "dense"


class Gate(Closed):
    """A student that fails the gate is kept but not registered."""

    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None


class Register(Closed):
    name: Name | None = None  # the config's own name unless given
    gate: Gate = Gate()


class Config(Closed):
    """One YAML a run."""

    name: Name
    preset: PresetName | None = None  # fills quant, distill and pack; what the file itself sets wins
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
    sweep: Sweep | None = None  # read by `bitmill sweep` alone; never part of a key

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, fields: Any) -> Any:
        preset = fields.get("preset") if isinstance(fields, dict) else None
        return (
            filled(fields, preset) if isinstance(preset, str) and preset in PRESETS else fields
        )  # an unknown one is refused by its type

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.pack.encoding == "base3" and not self.quant.ternary:
            raise ValueError(
                f"pack.encoding: base3 holds ternary codes only; quant.bits is {self.quant.bits} and "
                f"quant.quantizer is {self.quant.quantizer}; use encoding: dense, or a ternary quantizer at 2 bits "
                "throughout"
            )
        if self.task.name != "language_modeling" and self.data.unit == "line":
            raise ValueError(
                f"data.unit: line is running text, which the task {self.task.name} cannot use; leave it out"
            )
        if self.quant.gamma_init == "one" and self.quant.quantizer not in TAKES["gamma_init"]:  # packages may say it
            raise ValueError(
                f"quant.gamma_init is one, and the quantizer {self.quant.quantizer} has none; leave it out"
            )
        if self.quant.quantizer == "laq" and self.distill.optimizer != "adam":
            raise ValueError(
                f"quant.quantizer: laq weights its error by Adam's second moment, and distill.optimizer is "
                f"{self.distill.optimizer}; use adam, or quant.quantizer: laq_uniform"
            )
        if isinstance(self.model.source, dict) and self.finetune is None:
            raise ValueError("model.source is an architecture without weights; add a finetune section to train it")
        if self.distill.compared_layer != -1 and self.cache.mode == "states":
            raise ValueError(
                f"distill.contrast_layer is {self.distill.contrast_layer}, and cached states are those of the last "
                "layer only (-1); set cache.mode: online"
            )
        for knob, (value, default, takers) in {
            "evaluate.beams": (self.evaluate.beams, 6, ("summarization",)),
            "evaluate.generated_rows": (self.evaluate.generated_rows, None, ("summarization",)),
            "data.summary_column": (self.data.summary_column, "summary", ("summarization",)),
            "data.candidates_column": (self.data.candidates_column, None, ("next_utterance",)),
            "data.persona_column": (self.data.persona_column, None, ("next_utterance",)),
        }.items():
            if value != default and self.task.name not in takers:
                raise ValueError(
                    f"{knob} is {value!r} and has no effect, because task.name is {self.task.name}; leave it out, or "
                    f"use the task {takers[0]}"
                )
        for section, training in (("finetune", self.finetune), ("distill", self.distill)):
            if training is not None and training.batch_size < self.resources.workers:
                raise ValueError(
                    f"{section}.batch_size is {training.batch_size}, fewer rows than resources.workers "
                    f"({self.resources.workers}); raise one or lower the other"
                )
        return self
