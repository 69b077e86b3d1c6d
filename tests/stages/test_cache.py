"""What a cache of states is decided on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import RunError
from pipeline.execution.engine import Engine
from pipeline.models.build import build, read_config
from pipeline.stages import cache, sensitivity
from pipeline.stages.stage import Step
from pipeline.store.records import Shard
from pipeline.store.shards import map_states, open_shard, to_states
from tests.training.cases import ARCHITECTURE, HIDDEN, WIDTH, Case


def test_a_probe_and_a_sensitivity_do_not_show_the_order_of_the_shards(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    measured = []
    for shards in (case.train, case.train[::-1]):
        job = case.step_job({"quantizer": "quantgpt", "granularity": "per_tensor", "widths": [2], "rows": 8}, shards)
        tokens, kl_nats = sensitivity._measure(job)
        measured.append((cache.probe(job, "bfloat16"), tokens, {name: f"{v[2]:.6g}" for name, v in kl_nats.items()}))
    assert measured[0] == measured[1]


def test_a_shard_that_overflows_is_stored_as_bfloat16(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    teacher = build(read_config(ARCHITECTURE), seed=0)
    teacher.transformer.ln_f.weight.data.fill_(1e5)
    teacher.save_pretrained(case.teacher)
    stored = {}
    for dtype in ("float32", "float16"):
        job = case.step_job({})
        shard = Shard.model_validate_json(cache.CacheShard(job, dtype)(case.train[0]))
        stored[dtype] = to_states(*map_states(open_shard(job.dir, shard))).values
    assert torch.equal(stored["float16"], stored["float32"].bfloat16())
    assert cache.probe(job, "float16")[0] == "bfloat16"


def test_the_cost_of_each_dtype_is_measured_and_its_bytes_are_known(tmp_path: Path) -> None:
    """They grow as the steps between values do; int8 takes half of what float16 takes, and a scale a token."""
    case, costs = Case.make(tmp_path), {}
    build(read_config({**ARCHITECTURE, "initializer_range": 0.3}), seed=0).save_pretrained(case.teacher)
    for dtype in cache.BYTES_OF:
        job = case.step_job({})
        kept, costs[dtype], _ = cache.probe(job, dtype)
        assert kept == dtype
        shard = Shard.model_validate_json(cache.CacheShard(job, dtype)(case.train[0]))
        states = to_states(*map_states(open_shard(job.dir, shard)))
        assert sum(t.nbytes for t in states.tensors) == cache.cache_bytes(20, WIDTH, HIDDEN, dtype)
        assert states.dtype == dtype
    assert costs["float32"] < 1e-6 < costs["bfloat16"] < costs["int8"] < 1e-3


def test_states_that_cost_too_much_are_refused(tmp_path: Path) -> None:
    section = {"cache": {"mode": "states", "dtype": "bfloat16", "max_kl_nats": 0}}
    job = Case.make(tmp_path).step_job(section, workers=0)
    step = Step(**vars(job), version=1, engine=Engine(job.resources), advance=lambda done, total, note, points=(): None)
    with pytest.raises(RunError, match=r"computed in fp32 and stored as bfloat16, cost .* above cache\.max_kl_nats"):
        cache.run(step)
