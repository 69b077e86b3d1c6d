"""How teacher and student are trained, and what is kept of the teacher meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Beta, Closed, NotNegative, Positive, Rate

OptimizerName = Literal["adam", "muon"]
Schedule = Literal["linear", "cosine"]
NegativesFrom = Literal["teacher", "student", "vocabulary", "batch"]
FadeIn = Annotated[float, Field(ge=0, le=1)]


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
