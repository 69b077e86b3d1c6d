"""What every section of a configuration is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def checked_name(name: str) -> str:
    """Return a name that may be part of a path. Raises ValueError for another."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is no name; valid: letters, digits, '.', '_' and '-', the first a letter or digit")
    return name


def _checked_version(model: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9_-]+|/[1-9][0-9]*)", model):
        raise ValueError(f"{model!r} is no registered version; valid: name@alias or name/version, such as my-model/3")
    return model


Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, AfterValidator(checked_name)]  # of what is joined to paths: never ".." or a path itself
VersionName = Annotated[str, AfterValidator(_checked_version)]
FloatType = Literal["float32", "float16", "bfloat16"]


class Closed(BaseModel):
    """A frozen value that refuses keys it does not know."""

    # What was given is in `errors()`, by which `explain` shows it where it holds no password.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    def changed(self, *knobs: str) -> list[tuple[str, Any]]:
        """Return those of some knobs whose values are not their defaults, with the values."""
        fields = type(self).model_fields
        return [(knob, getattr(self, knob)) for knob in knobs if getattr(self, knob) != fields[knob].default]


Bounds = Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(exclude_if=lambda bounds: not bounds)]


class Bounded(Closed):
    """Bounds on metrics of the validation split, by name: those of `evaluate.suites` too."""

    at_least: Bounds = {}
    at_most: Bounds = {}

    @property
    def bounds(self) -> list[tuple[str, str, float]]:
        """Return each bound: its knob, the metric, and the value."""
        named = (("at_least", self.at_least), ("at_most", self.at_most))
        return [(knob, metric, bound) for knob, bounds in named for metric, bound in bounds.items()]
