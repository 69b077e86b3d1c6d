"""How teacher and student are trained, and what is kept of the teacher meanwhile."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Beta, Closed, FloatType, NotNegative, Positive, Rate, VersionName

Schedule = Literal["linear", "cosine"]


class Training(Closed):
    """What the trainer takes. Exactly one of `steps` and `epochs`; rates decay by `schedule` to 1e-6.

    With `precision: bf16` a step's products are bf16, and so is what follows from them, logits too; levels and codes of
    weights, the optimizer, validation and scoring are fp32. A teacher that a student learns from is bf16 on every GPU,
    and fp32 on every CPU.
    `lr` is Adam's; the scales say by what it is multiplied for some parameters. With `optimizer: muon` the matrices of
    the layers are moved by Muon instead, by about `muon_lr` times their own root mean square a step."""

    steps: Positive | None = None
    epochs: Rate | None = None
    batch_size: Positive = 32
    lr: Rate = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NotNegative = 0.0
    schedule: Schedule = "linear"
    optimizer: Literal["adam", "muon"] = "adam"
    muon_lr: Rate = 0.02
    muon_momentum: Beta = 0.6
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    vector_lr_scale: Rate = 1.0  # norms, biases, positions
    embedding_lr_scale: Rate = 1.0  # and head
    clip_norm: Rate | None = 1.0  # of the weights' gradient; null: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: Positive = 100  # optimizer steps between validations; the best one ships
    eval_rows: Positive = 512  # rows of validation that choose the best step, drawn by a hash of their content
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def optimizer_steps(self, rows: int) -> int:
        """Count the optimizer steps; epochs count rows of the training split."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 0) * rows / self.batch_size))

    @model_validator(mode="after")
    def _rates_of_muon(self) -> Training:
        for knob, value in self.changed("muon_lr", "muon_momentum"):
            if self.optimizer != "muon":
                raise ValueError(
                    f"{knob} is {value:g} and has no effect, because optimizer is {self.optimizer}; leave it out, or "
                    "set optimizer: muon"
                )
        return self


class Finetune(Training):
    """Full-precision training of the teacher; `dropout` null keeps the model's own."""

    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Distill(Training):
    """Quantization-aware distillation (Tao et al. 2022); defaults are the paper's.

    `start`: `name@alias` or `name/version`. The student starts from the latent weights and the scales that this version
    of a model was trained to, not from the teacher's weights; `quant.gamma_init` then says nothing. Architecture,
    vocabulary and quantization must be the same. The optimizer, the schedule and the memory bank begin afresh.

    `products: int8`: forward passes of training multiply the 8-bit codes of inputs and weights as integers, exactly.
    Gradients, validation and scores are computed as with `float`, and so is each product that 8-bit integers cannot
    give: of embeddings and heads, of scales by group, of four-level grids widened to 8 bits (seq), of activations of 32
    bits or of one range a tensor, while quantization fades in, of at most 16 tokens, of sizes that 8 does not divide,
    and on processors whose 8-bit products are inexact.
    """

    # Left out of recipes where it is null, and what it names enters keys by content.
    start: Annotated[VersionName | None, Field(exclude_if=lambda start: start is None)] = None
    steps: Annotated[int, Field(ge=0)] | None = None  # 0: quantized and scored as it is
    gamma_lr: Rate = 1e-3
    fade_in: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of steps until quantized
    # Left out of recipes where it is float.
    products: Annotated[Literal["float", "int8"], Field(exclude_if=lambda products: products == "float")] = "float"
    contrast_weight: NotNegative = 0.1
    temperature: Rate = 0.1
    negatives: Positive = 64
    negatives_from: Literal["teacher", "student", "vocabulary", "batch"] = "teacher"
    contrast_layer: Annotated[int, Field(lt=0)] = -1  # -1: what the head reads
    momentum: Beta = 0.5

    @property
    def compared_layer(self) -> int:
        """Return the layer whose states are contrasted; the last where none are."""
        return self.contrast_layer if self.contrast_weight > 0 else -1

    @model_validator(mode="after")
    def _start_is_quantized(self) -> Distill:
        if self.start is not None and self.fade_in:
            raise ValueError(
                f"fade_in is {self.fade_in:g}, and start names weights that were trained to be quantized: taking that "
                "away and fading it in again would undo what they learned; leave fade_in out, or start"
            )
        return self

    @model_validator(mode="after")
    def _another_row_to_contrast_with(self) -> Distill:
        if self.negatives_from == "batch" and self.batch_size == 1 and self.contrast_weight:
            raise ValueError(
                "negatives_from is batch, and batch_size 1 has no other sequence; raise batch_size, or use negatives "
                "from teacher, student or vocabulary"
            )
        return self


class Cache(Closed):
    """`states`: hidden states are stored; `logits`: so many `draws` a position from the teacher's distribution, which
    is all that distillation without contrast learns from, in fewer bytes, and on average alone; `online`: the teacher
    runs in each step; `auto`: states if each row is read at least twice and all fit in `resources.max_cache_gib`, else
    online. `dtype: int8` keeps states as codes with scales, half of what float16 takes. `max_kl_nats` bounds
    KL(teacher || teacher from cache) a token, or in each step, or that draws are from; on a GPU the bf16 of the
    teacher's pass and head is part of it."""

    mode: Literal["states", "logits", "online", "auto"] = "auto"
    dtype: FloatType | Literal["int8"] = "float16"
    draws: Positive = 50
    max_kl_nats: NotNegative = 2e-3

    @model_validator(mode="after")
    def _knobs_of_the_mode(self) -> Cache:
        for knob, value in self.changed("dtype" if self.mode == "logits" else "draws"):
            raise ValueError(f"{knob} is {value} and has no effect, because mode is {self.mode}; leave it out")
        return self
