"""Suggestions by Optuna: reproducible, within the space, and better informed than chance."""

from __future__ import annotations

import math

from pipeline.config.sweep import Sweep
from pipeline.sweep.sampler import sample_values

SWEEP = Sweep(
    space={
        "distill.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "quant": [{"bits": "2-2-8"}, {"bits": "4-4-8"}],
        "distill.warmup_steps": {"low": 0, "high": 9, "integer": True},
    },
    search="optuna",
    samples=20,
    objectives=("gap",),
)


def score(values):
    return (abs(math.log10(values["distill.lr"]) + 3) + (values["quant"]["bits"] == "2-2-8"),)


def test_a_sample_is_a_function_of_seed_index_and_what_is_known():
    tried = [(sample_values(SWEEP, index, []), None) for index in range(3)]
    assert [values for values, _ in tried] == [sample_values(SWEEP, index, []) for index in range(3)]
    scored = [(values, score(values)) for values, _ in tried]
    assert sample_values(SWEEP, 3, scored) == sample_values(SWEEP, 3, scored)
    for values, _ in tried:
        assert 1e-5 <= values["distill.lr"] <= 1e-1
        assert values["quant"] in SWEEP.space["quant"]
        assert values["distill.warmup_steps"] in range(10)


def test_what_is_known_guides_it():
    tried = []
    for index in range(30):
        values = sample_values(SWEEP, index, tried)
        tried.append((values, score(values)))
    early, late = ([score(values)[0] for values, _ in part] for part in (tried[:10], tried[-10:]))
    assert sum(late) < sum(early)


def test_several_objectives_and_failed_trials_are_taken():
    both = SWEEP.model_copy(update={"objectives": ("gap", "bytes")})
    known = [(sample_values(both, index, []), (float(index), float(-index))) for index in range(8)]
    known.append((sample_values(both, 8, []), None))
    assert set(sample_values(both, 9, known)) == set(SWEEP.space)
