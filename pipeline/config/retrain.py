"""The section `retrain` of a configuration: what challengers are made, and what one must show to become champion. It
never enters a step's keys: a challenger is an ordinary run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.config.base import Bounded, Closed, NotNegative, Rate

ExportFormat = Literal["transformers", "onnx", "gguf", "compressed-tensors"]


class PromotionGate(Bounded):
    """The rules that a challenger must pass, all of them; a rule that is null, or names nothing, is not asked.

    `min_gain` is how much better than the champion it must be in the task's own measure, on the test rows of both, at
    the confidence of `confidence`, one-sided, by a paired bootstrap over documents: nats a token of language modelling
    (0.01 is 1 % of perplexity), accuracy 0-1, ROUGE-L points. Other documents alone would have given less at most in
    one of twenty cases, of `confidence: 0.95`. Another seed alone moves a student too, which no document can tell: keep
    `min_gain` above what two seeds of your recipe differ by. `at_least` and `at_most` are as in `register.gate`.
    """

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    min_gain: NotNegative = 0.01
    max_size_mib: Rate | None = None  # packed weights, scales included
    max_latency_ms: Rate | None = None  # of a token, measured on the machine of the tick
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None  # student's over its own teacher's, on validation
    exports: tuple[ExportFormat, ...] = ()  # that must be verified


class Retrain(Closed):
    """One tick of a schedule: a challenger by each of `recipes` where there is new data, the best of them on validation
    against the champion."""

    recipes: tuple[dict[str, Any], ...] = ({},)  # values laid over the configuration, by path, such as distill.lr: 1e-3
    gate: PromotionGate = PromotionGate()
    keep: Annotated[int, Field(ge=1)] = 3  # newest versions that keep all that made them, in `bitmill gc`
    warm_start: bool = False  # students start from the champion's latent weights
    on_decision: str | None = None  # a command, given the decision as JSON on its stdin

    @field_validator("recipes")
    @classmethod
    def _some(cls, recipes: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if not recipes:
            raise ValueError("recipes is empty, so there is nothing to train; leave it out for the configuration's own")
        for values in recipes:
            section = values.get("register")
            if name := values.get("register.name") or (section.get("name") if isinstance(section, dict) else None):
                raise ValueError(
                    f"recipes sets register.name to {name!r}, and one name has one champion, which all recipes meet: "
                    "leave it out, or set register.name of the whole configuration"
                )
            if path := next((path for path in values if path == "model" or path.startswith("model.tokenizer")), None):
                raise ValueError(
                    f"recipes sets {path}, and with it the tokenizer, but champion and challengers are compared on the "
                    "same rows, which one tokenizer reads: leave it out, or set it for the whole configuration"
                )
        return recipes
