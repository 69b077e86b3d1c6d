"""Values sampled by Optuna: what to try next, given what was tried and what it scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.config.sweep import Between, Sweep
from pipeline.store.keys import canonical_json

logging.getLogger("optuna").setLevel(logging.ERROR)


def sample_values(
    sweep: Sweep, index: int, tried: Sequence[tuple[dict[str, Any], tuple[float, ...] | None]]
) -> dict[str, Any]:
    """Return the values of trial number `index`: a function of the seed, the index and what is known.

    Args:
        tried: values of other trials with their scores, all to be minimised; None: it failed, or is still running.
    """
    sampler = optuna.samplers.TPESampler(seed=sweep.seed * 100_003 + index, n_startup_trials=5, multivariate=True)
    study = optuna.create_study(directions=["minimize"] * len(sweep.objectives), sampler=sampler)
    distributions = {path: _distribution(values) for path, values in sweep.space.items()}
    for values, scores in tried:
        if scores is not None:
            params = {path: _param(sweep.space[path], value) for path, value in values.items() if path in distributions}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=list(scores)))
    sampled = study.ask(distributions).params.items()
    return {path: of[param] if isinstance(of := sweep.space[path], list) else param for path, param in sampled}


def _distribution(values: list[Any] | Between) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(list(range(len(values))))
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _param(values: list[Any] | Between, value: Any) -> Any:
    return [canonical_json(v) for v in values].index(canonical_json(value)) if isinstance(values, list) else value
