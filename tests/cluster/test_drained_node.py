"""A node that goes away says so before: training makes a checkpoint in time, and goes on from it on what is left."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.config.training import Distill
from pipeline.execution.engine import Engine
from pipeline.stages import distill
from pipeline.stages.stage import StepJob
from pipeline.store.keys import recipe_of
from pipeline.training.trainer import Trainer
from tests.training.cases import Case

pytestmark = pytest.mark.timeout(900)
GRACE_S = 5
RECIPE = {"steps": 100, "batch_size": 4, "negatives": 4, "eval_every": 100, "eval_rows": 4, "lr": 2e-3}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing, and a node of one CPU."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    signal.signal(signal.SIGTERM, handler)


def slowly(job: StepJob, folder: Path, device: Any, report: Any, ending: Callable[[], bool]) -> None:
    """Train at ten steps a second, so that the end of a node is met on the way."""
    step = Trainer.train_step

    def waiting(trainer: Trainer, number: int) -> Any:
        time.sleep(0.1)
        return step(trainer, number)

    def told(done: int, total: int, note: str, points: Any = ()) -> None:
        with open(folder / "told", "a") as file:  # for of many messages at once the driver takes the last
            file.write(json.dumps([done, note]) + "\n")
        report(done, total, note, points)

    (folder / "node").write_text(ray.get_runtime_context().get_node_id())
    Trainer.train_step = waiting  # type: ignore[method-assign]
    distill._train(job, device, told, ending)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_drained_node_leaves_a_checkpoint(cluster: Cluster, tmp_path: Path, workers: int) -> None:
    """One worker goes on where the other node is, two as one."""
    cluster.add_node(num_cpus=1)
    case, elastic = Case.make(tmp_path), {"workers": workers, "min_workers": 1}
    recipes = {"distill": recipe_of(Distill(**RECIPE)), "quant": recipe_of(Quant())}
    job = case.step_job(recipes, checkpoint_minutes=1000, **elastic)
    drained, heard, goes = list[int](), list[int](), list[threading.Timer]()

    def advance(done: int, total: int, note: str, points: Any = ()) -> None:
        heard.append(done)
        if done > 0 and not drained:
            drained.append(done)
            deadline_ms = int(1000 * (time.time() + GRACE_S))
            reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
            client, name = ray._raylet.GcsClient(address=cluster.address), (tmp_path / "node").read_text()
            assert client.drain_node(name, reason, "taken back", deadline_ms)[0]
            (node,) = (node for node in cluster.worker_nodes if node.node_id == name)
            gone = threading.Timer(GRACE_S, cluster.remove_node, (node, False))
            gone.start()
            goes.append(gone)

    engine = Engine(Resources(ray_address=cluster.address, max_failures=workers - 1, **elastic))
    engine.train(partial(slowly, job, tmp_path), job.dir, advance)
    engine.close()
    goes[0].join()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    (announced,) = (done for done, note in told if note.endswith("checkpoint before the end that was announced"))
    assert [done for done, note in told if note == "resumed"] == [announced]
    assert announced > drained[0]
    assert heard[-1] == 100
    assert told[-1][0] == 100
    assert (Path(job.dir.uri) / "1/attempt/result.json").exists()
    fewer = [note for _, note in told if "workers" in note]
    assert fewer == ["workers is 1 from here on, as many as there are"] * (workers - 1)


@pytest.mark.soak
def test_a_node_that_comes_gets_a_worker_after_a_checkpoint(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that began as one worker, for want of room, goes on as two."""
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", lambda handler: None)  # a thread adds the node
    case, elastic = Case.make(tmp_path), {"workers": 2, "min_workers": 1, "checkpoint_minutes": 0.05}
    recipe = Distill(**RECIPE | {"steps": 1500, "eval_every": 1500})
    job = case.step_job({"distill": recipe_of(recipe), "quant": recipe_of(Quant())}, **elastic)
    heard = list[int]()

    def advance(done: int, total: int, note: str, points: Any = ()) -> None:
        if done > 0 and len(cluster.worker_nodes) == 1:
            cluster.add_node(num_cpus=1)
        heard.append(done)

    engine = Engine(Resources(ray_address=cluster.address, max_failures=0, **elastic))
    engine.train(partial(slowly, job, tmp_path), job.dir, advance)
    engine.close()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    changes = [(done, note) for done, note in told if "workers" in note]
    assert [note.partition(" from here")[0] for _, note in changes] == ["workers is 1", "workers is 2"]
    grown, before = changes[1][0], max(done for done, _ in told[: told.index(list(changes[1]))])
    assert 0 < grown <= before < grown + 100  # a checkpoint came every three seconds, some 30 steps
    assert heard[-1] == 1500
