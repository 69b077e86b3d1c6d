"""The section `sweep` of a configuration: which values are tried, in what order, and when a trial is given up. It never
enters a trial's keys: a trial is an ordinary configuration with other values."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline import metrics
from pipeline.config.base import Closed, Positive

Search = Literal["grid", "random", "optuna"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
MOST_TRIALS = 1000


class Between(Closed):
    """Numbers from `low` to `high`, both included; `log`: as likely in each decade; `integer`: whole ones."""

    low: Finite
    high: Finite
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Between:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be the smaller")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0; it is {self.low:g}")
        if self.integer and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"integer needs whole numbers; low is {self.low:g} and high {self.high:g}")
        return self

    def at(self, share: float) -> float | int:
        """Return the number at a share between 0 and 1 of the way."""
        if self.integer and not self.log:
            return min(int(self.high), int(self.low) + int(share * (self.high - self.low + 1)))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        number = low + share * (high - low)
        number = min(self.high, max(self.low, math.exp(number) if self.log else number))
        return round(number) if self.integer else number


class Asha(Closed):
    """Asynchronous successive halving on the validation loss: of the trials that reach `grace_steps` optimizer steps,
    and then each multiple by `reduction_factor`, the best one in `reduction_factor` goes on. Where bytes are an
    objective, a trial is compared with those that are not larger."""

    grace_steps: Positive
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class Sweep(Closed):
    """`space` maps dotted paths of the configuration, such as quant.bits, to a list of values or {low, high}."""

    space: dict[str, list[Any] | Between] = {}
    search: Search = "grid"
    samples: Positive | None = None  # trials of random and optuna
    seed: Annotated[int, Field(ge=0)] = 0
    asha: Asha | None = None
    objectives: tuple[str, ...] = ("gap", "bytes")
    max_concurrent: Positive | None = None  # null: as many as Ray has CPUs for
    budget_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # bytes of weights that overrides fit
    proposals: Positive = 3  # assignments of bits that are trained under budget_mib

    @field_validator("space")
    @classmethod
    def _values(cls, space: dict[str, list[Any] | Between]) -> dict[str, list[Any] | Between]:
        for path, values in space.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"space[{path}] is an empty list; give the values to try")
        return space

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        known = metrics.objectives()
        for name in objectives:
            if name not in known:
                raise ValueError(f"objectives: no trial reports {name!r}; valid: {', '.join(known)}")
        if not objectives or len(set(objectives)) < len(objectives):
            raise ValueError(f"objectives: {list(objectives)}; name at least one, each once")
        return objectives

    @model_validator(mode="after")
    def _searchable(self) -> Sweep:
        if not self.space and self.budget_mib is None:
            raise ValueError(
                "space is empty, so there is nothing to sweep; name paths with values, such as "
                "space: {quant.bits: [2-2-8, 4-4-8]}, or set budget_mib"
            )
        ranges = [path for path, values in self.space.items() if isinstance(values, Between)]
        if self.budget_mib is not None and self.search == "optuna":
            raise ValueError("budget_mib proposes its own trials; use it with search: grid or random")
        if self.budget_mib is not None and "quant.bits" in self.space:
            raise ValueError("budget_mib chooses quant.bits, so the space cannot hold it; take one of them out")
        if self.search == "grid" and ranges:
            raise ValueError(f"search: grid needs lists, and {ranges[0]} is a range; use search: random or optuna")
        if self.search != "grid" and self.samples is None:
            raise ValueError(f"search: {self.search} needs samples, the number of trials")
        if self.search == "grid" and self.samples is not None:
            raise ValueError("samples is for search: random and optuna; a grid is tried whole")
        count = math.prod(len(v) for v in self.space.values() if isinstance(v, list))
        if max(self.samples or 0, count if self.search == "grid" else 0) > MOST_TRIALS:
            raise ValueError(f"the sweep has more than {MOST_TRIALS} trials; lower samples or shorten the lists")
        return self

    @property
    def at_most(self) -> int:
        """Return the most trials of a search that draws its values: no more than there are combinations."""
        lists = [values for values in self.space.values() if isinstance(values, list)]
        combinations = math.prod(map(len, lists)) if len(lists) == len(self.space) else MOST_TRIALS
        return min(self.samples or 0, combinations)

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination, the last path changing fastest."""
        lists = [values for values in self.space.values() if isinstance(values, list)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*lists)] if lists else []
