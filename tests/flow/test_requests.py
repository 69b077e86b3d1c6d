"""Requests to S3 that are counted beforehand, beside those that a real run makes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable

import pytest

from jobs.bench.chaos.proxy import FaultProxy
from pipeline.execution import progress_actor
from pipeline.flow.capacity import rates_of, step_cost
from pipeline.flow.plan import plan_run
from pipeline.flow.requests import BEAT, PART_BYTES, Requests, fetched, of_checkpoints, of_rows, of_step, stored
from pipeline.store import lease, s3, shards
from pipeline.store.objects import open_objects
from tests.store.test_step_store import serve_s3

MARGIN = 0.15


def made(requests: Iterable[tuple[tuple[str, str], dict[str, str]]]) -> Requests:
    """Count what came to S3 as S3 does."""
    writes = Counter(method in ("PUT", "POST") or "list-type" in p or "?uploads" in p for (method, p), _ in requests)
    return Requests(writes=writes[True], reads=writes[False])


def test_a_run_makes_as_many_as_were_counted(tmp_path, tiny_config, run_flow, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 640)  # so that there are many
    monkeypatch.setattr(lease, "HEARTBEAT_S", 1e6)  # so that it does not matter how long it takes
    monkeypatch.setattr(progress_actor, "LOOK_S", 1e6)
    proxy, scratch = FaultProxy(), tmp_path / "scratch"
    with serve_s3(faults=proxy) as bucket:
        resources = {"storage_uri": f"{bucket}/project", "local_cache_dir": str(scratch), "worker_tflops": 1e3}
        brief = {"steps": 2, "eval_every": 2}
        config = tiny_config(tmp_path, finetune=brief, distill={"steps": 75}, resources=resources)  # each row once
        proxy.requests.clear()
        for stage in ("tokenize", "finetune", "cache", "distill"):
            run_flow(config, stage)
            shutil.rmtree(scratch)  # each begins without copies, as on nodes that saw nothing of those before
        came = made(proxy.requests)
        plan = plan_run(config, "distill")
    rates = rates_of(config.resources)
    counted = sum((step_cost(step, plan, rates).requests for step in plan.steps), Requests())
    assert len(plan.tokens.splits["train"].shards) == 30
    assert counted.writes == pytest.approx(came.writes, rel=MARGIN)
    assert counted.reads == pytest.approx(came.reads, rel=MARGIN)


def test_large_objects_travel_in_parts(tmp_path) -> None:
    assert s3.PARTS.multipart_chunksize == s3.PARTS.multipart_threshold == PART_BYTES
    path, proxy = tmp_path / "large", FaultProxy()
    look = Requests(reads=1)  # at the lease, which `stored` counts
    with serve_s3(faults=proxy) as bucket:
        objects = open_objects(bucket)
        for size in (1, PART_BYTES + 1):
            path.write_bytes(bytes(size))
            proxy.requests.clear()
            objects.upload("large", path)
            assert made(proxy.requests) + look == stored(size)
            proxy.requests.clear()
            objects.local("large", tmp_path / str(size))
            assert made(proxy.requests) == fetched(size)
    assert (stored(3 * PART_BYTES), fetched(3 * PART_BYTES)) == (Requests(5, 1), Requests(0, 3))


def test_shards_checkpoints_and_heartbeats_are_counted_one_by_one() -> None:
    assert of_rows(10, 2 * PART_BYTES, parts=5) == Requests(writes=10 * 4 + 5 + 2, reads=10 + 5)
    assert of_checkpoints(2, PART_BYTES) == Requests(writes=2 * (18 + 1 + 4), reads=2 * (1 + 1 + 4))
    longer = of_step(30, 100)
    assert longer == of_step(0, 100) + BEAT * 2
