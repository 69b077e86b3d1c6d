"""What a cache keeps, and what that is decided on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distill.draws import drawn, starts
from pipeline.errors import RunError
from pipeline.execution.engine import Engine
from pipeline.models.build import build, load_model, read_config
from pipeline.stages import cache, sensitivity
from pipeline.stages.kept import KeptDraws, KeptStates
from pipeline.stages.stage import Step
from pipeline.store.records import Shard
from pipeline.store.shards import map_stored, open_shard, read_tokens, to_stored
from tests.training.cases import ARCHITECTURE, HIDDEN, WIDTH, Case


def test_a_probe_and_a_sensitivity_do_not_show_the_order_of_the_shards(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    measured = []
    for shards in (case.train, case.train[::-1]):
        job = case.step_job({"quantizer": "quantgpt", "granularity": "per_tensor", "widths": [2], "rows": 8}, shards)
        tokens, kl_nats = sensitivity._measure(job)
        measured.append(
            (cache.probe(job, KeptStates("bfloat16")), tokens, {name: f"{v[2]:.6g}" for name, v in kl_nats.items()})
        )
    assert measured[0] == measured[1]


def test_a_shard_that_overflows_is_stored_as_bfloat16(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    teacher = build(read_config(ARCHITECTURE), seed=0)
    teacher.transformer.ln_f.weight.data.fill_(1e5)
    teacher.save_pretrained(case.teacher)
    stored = {}
    for dtype in ("float32", "float16"):
        job = case.step_job({})
        shard = Shard.model_validate_json(cache.CacheShard(job, KeptStates(dtype))(case.train[0]))
        stored[dtype] = to_stored(*map_stored(open_shard(job.dir, shard))).values
    assert torch.equal(stored["float16"], stored["float32"].bfloat16())
    assert cache.probe(job, KeptStates("float16"))[0] == KeptStates("bfloat16")


def test_the_cost_of_each_dtype_is_measured_and_its_bytes_are_known(tmp_path: Path) -> None:
    """They grow as the steps between values do; int8 takes half of what float16 takes, and a scale a token."""
    case, costs = Case.make(tmp_path), {}
    build(read_config({**ARCHITECTURE, "initializer_range": 0.3}), seed=0).save_pretrained(case.teacher)
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        job = case.step_job({})
        kept, costs[dtype], _ = cache.probe(job, KeptStates(dtype))
        assert kept == KeptStates(dtype)
        shard = Shard.model_validate_json(cache.CacheShard(job, KeptStates(dtype))(case.train[0]))
        states = to_stored(*map_stored(open_shard(job.dir, shard)))
        assert sum(t.nbytes for t in states.tensors) == 20 * kept.row_bytes(WIDTH, HIDDEN)
        assert states.dtype == dtype
    assert costs["float32"] < 1e-6 < costs["bfloat16"] < costs["int8"] < 1e-3


def test_states_that_cost_too_much_are_refused(tmp_path: Path) -> None:
    case = Case.make(tmp_path)
    build(read_config({**ARCHITECTURE, "initializer_range": 0.3}), seed=0).save_pretrained(
        case.teacher
    )  # it has opinions
    job = case.step_job({"cache": {"mode": "states", "dtype": "bfloat16", "max_kl_nats": 0}}, workers=0)
    step = Step(**vars(job), version=1, engine=Engine(job.resources), advance=lambda done, total, note, points=(): None)
    with pytest.raises(RunError, match=r"in fp32, kept as states as bfloat16, costs .* above cache\.max_kl_nats"):
        cache.run(step)


def test_draws_are_the_same_whatever_the_batch_and_their_bytes_are_known(tmp_path: Path) -> None:
    """Each row's are those that its own ids and the teacher's distribution give, and nothing else."""
    case, kept, files = Case.make(tmp_path), KeptDraws("uint8", 6), []
    build(read_config({**ARCHITECTURE, "initializer_range": 0.3}), seed=0).save_pretrained(case.teacher)
    for batch in (3, 20):
        job = case.step_job({}, inference_batch=batch)
        shard = Shard.model_validate_json(cache.CacheShard(job, kept)(case.train[1]))
        stored = to_stored(*map_stored(open_shard(job.dir, shard)))
        assert stored.values.nbytes == 20 * kept.row_bytes(WIDTH, HIDDEN) == 20 * WIDTH * 6
        files.append(shard.file.sha256)
    assert files[0] == files[1]
    ids, _ = read_tokens(open_shard(case.tokens, case.train[1]))
    rows = torch.tensor(ids).long()
    with torch.no_grad():
        logits = load_model(case.teacher).eval()(input_ids=rows).logits
    assert (stored.wide() == drawn(logits, starts(rows), 6)).double().mean() > 0.999  # but where a sum is rounded


def test_the_distribution_that_is_drawn_from_costs_nothing_on_a_cpu(tmp_path: Path) -> None:
    job = Case.make(tmp_path).step_job({})
    assert cache.probe(job, KeptDraws("uint32", 5)) == (KeptDraws("uint8", 5), 0.0, "fp32")  # for the model's own table
