"""Reaching and starting Ray: whose fault it is when that fails; which device work is given; whose work goes on."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.config.resources import Resources
from pipeline.errors import BeginAgainError, ConfigError, FencedOffError, LostError, OverBudgetError, UnforeseenError
from pipeline.execution import engine as engine_module
from pipeline.execution import gauges, progress_actor
from pipeline.execution.engine import Engine, _guarded, _told, explained
from pipeline.models import device
from pipeline.store.lease import Lease, Owner
from pipeline.store.objects import open_objects
from pipeline.store.records import Checksum
from pipeline.store.step_store import StepDir

ELSEWHERE = "127.0.0.1:6379"
LATE = "The current node timed out during startup."
LOST = f"did not start: {LATE}.*run the same command again"


@pytest.mark.parametrize(
    ("address", "raised", "found", "needle"),
    [
        (
            ELSEWHERE,
            ConnectionError("nobody listens"),
            ConfigError,
            r"at 127\.0\.0\.1:6379: nobody listens.*RAY_ADDRESS",
        ),
        (ELSEWHERE, TimeoutError("nobody answers"), ConfigError, r"at 127\.0\.0\.1:6379: nobody answers"),
        (ELSEWHERE, Exception(LATE), LostError, LOST),
        (None, Exception(LATE), LostError, LOST),
        (None, RuntimeError(LATE), LostError, LOST),
        (None, TimeoutError(LATE), LostError, LOST),
        (None, PermissionError("/tmp/ray"), ConfigError, "at this machine: /tmp/ray"),
        (ELSEWHERE, TypeError("a mistake of ours"), TypeError, "a mistake of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_ray_from_starting_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, address: str | None, raised: Exception, found: type[Exception], needle: str
) -> None:
    def init(**settings: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    engine = Engine(Resources(ray_address=address))
    with pytest.raises(found, match=needle) as caught:
        engine.start()
    assert caught.type is found
    engine.close()


@pytest.fixture
def step_dir(tmp_path: Path) -> StepDir:
    return StepDir(str(tmp_path / "store"), "distill", "0" * 32, str(tmp_path / "scratch"))


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda:0")])
def test_training_in_this_process_has_the_gpu_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, step_dir: StepDir, gpus: int, expected: str
) -> None:
    monkeypatch.setattr(device, "this_device", lambda: torch.device("cuda", 0))  # Ray would try a GPU that is not there
    given: list[str] = []

    def worker(*, device: Any, report: Any, ending: Any) -> None:
        given.append(str(device))

    Engine(Resources(workers=0, gpus_per_worker=gpus)).train(worker, step_dir, lambda *progress, points=(): None)
    assert given == [expected]


def test_a_task_asks_for_the_gpus_it_is_given(monkeypatch: pytest.MonkeyPatch, step_dir: StepDir) -> None:
    asked: list[float] = []

    def tasks(self: Engine, work: list[Callable[[], int]], step_dir: StepDir, advance: Any, gpus: float) -> list[int]:
        asked.append(gpus)
        return [piece() for piece in work]

    monkeypatch.setattr(Engine, "tasks", tasks)
    engine = Engine(Resources(gpus_per_worker=0.5))
    assert [engine.task(lambda: 1, step_dir), engine.task(lambda: 2, step_dir, gpus=0.5)] == [1, 2]
    assert asked == [0, 0.5]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # metrics wait for ten seconds else
        patch.setenv("RAY_metrics_report_interval_ms", "200")
        ray.init(address="local", num_cpus=2, namespace="bitmill", log_to_driver=False, dashboard_host="127.0.0.1")
    yield
    ray.shutdown()


def scraped(condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """What Prometheus would read of our gauges on this node, by their names, once the condition holds."""
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    end = time.monotonic() + 120
    while True:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_bitmill_")]
        read = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
        if condition(read):
            labels = dict(zip(gauges.LABELS, ("chat", "distill", "f" * gauges.KEY_CHARACTERS), strict=True))
            assert all(f'{name}="{value}"' in line for line in lines for name, value in labels.items())
            return read
        assert time.monotonic() < end, lines
        time.sleep(0.1)


def test_prometheus_reads_the_gauges_of_a_step_from_ray(two_cpus: None) -> None:
    heard: list[Any] = []
    point = {"step": 3.0, "other": 1.0, **{name: 100.0 + index for index, name in enumerate(gauges.OF_POINTS)}}
    advance = lambda *progress: heard.append(progress)  # noqa: E731
    with gauges.published("chat", "distill", "f" * 64, advance) as told:
        told(3, 7, "loss 1.5", [point])
        assert heard == [(3, 7, "loss 1.5", [point])]
        read = scraped(lambda read: len(read) == len(gauges.GAUGES))
        assert set(read) == {f"ray_{name}" for name in gauges.GAUGES}
        assert [read[f"ray_{gauge}"] for gauge in gauges.OF_POINTS.values()] == [point[n] for n in gauges.OF_POINTS]
        assert (read["ray_bitmill_running"], read["ray_bitmill_done"], read["ray_bitmill_total"]) == (1, 3, 7)
        assert 0 < read["ray_bitmill_last_advance_timestamp_seconds"] <= time.time()
    assert scraped(lambda read: read["ray_bitmill_running"] == 0)["ray_bitmill_done"] == 3


def waits(folder: Path, **told: Any) -> None:
    """Work that goes on until it is ended from outside; a test that fails leaves it for two minutes at most."""
    (folder / f"{os.getpid()}.begun").touch()
    end = time.monotonic() + 120
    while time.monotonic() < end and not (folder / "go").exists():
        time.sleep(0.05)
    (folder / "ended").touch()


@pytest.fixture
def taken_over(step_dir: StepDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepDir]:
    """A step that is held until work has begun, and then another process holds it."""
    monkeypatch.setattr(engine_module, "LOOK_S", 0.1)
    monkeypatch.setattr(progress_actor, "LOOK_S", 0.1)
    over = threading.Event()

    def take_over() -> None:
        while not any(tmp_path.glob("*.begun")) and not over.wait(0.05):
            pass
        theirs = Lease(Owner("elsewhere", 1, 0), 2).to_json()
        open_objects(step_dir.storage_uri).write(f"{step_dir.stage}/{step_dir.key}/lease.json", theirs)

    thread = threading.Thread(target=take_over)
    with step_dir.hold(False, print) as held:
        thread.start()
        yield held
        over.set()
        thread.join()
        (tmp_path / "go").touch()


def test_tasks_of_a_step_that_was_taken_over_are_not_waited_for(
    two_cpus: None, taken_over: StepDir, tmp_path: Path
) -> None:
    work = [partial(waits, tmp_path)] * 3
    with pytest.raises(FencedOffError, match="no longer ours: it is held by process 1 on elsewhere"):
        Engine(Resources(workers=2)).tasks(work, taken_over, lambda *progress, points=(): None, 0)
    assert not (tmp_path / "ended").exists()


def brief(folder: Path) -> None:
    """A piece of much work."""
    (folder / f"{os.getpid()}.begun").touch()
    time.sleep(0.1)


def of_items(folder: Path) -> Callable[[Checksum], str]:
    """What an actor does with each of many items."""

    def work(item: Checksum) -> str:
        brief(folder)
        return item.sha256

    return work


@pytest.mark.parametrize("workers", [0, 1])
def test_much_brief_work_of_a_step_that_was_taken_over_is_given_up(
    two_cpus: None, taken_over: StepDir, tmp_path: Path, workers: int
) -> None:
    items = [Checksum(bytes=number, sha256=str(number)) for number in range(40)]
    engine, made = Engine(Resources(workers=workers)), []
    with pytest.raises(FencedOffError, match="no longer ours: it is held by process 1 on elsewhere"):
        made += engine.shards(partial(of_items, tmp_path), items, lambda *progress, points=(): None, 0, taken_over)
    with pytest.raises(FencedOffError, match="no longer ours: it is held by process 1 on elsewhere"):
        engine.tasks([partial(brief, tmp_path)] * 40, taken_over, lambda *progress, points=(): None, 0)


def meeting(folder: Path) -> Callable[[Checksum], str]:
    """Work of which two calls have to run at once."""
    (folder / uuid.uuid4().hex).touch()
    both = threading.Barrier(2, timeout=60)

    def work(item: Checksum) -> str:
        both.wait()
        return item.sha256

    return work


@pytest.mark.parametrize("workers", [0, 1])
def test_calls_of_one_worker_run_at_once(two_cpus: None, tmp_path: Path, workers: int) -> None:
    items = [Checksum(bytes=number, sha256=str(number)) for number in range(6)]
    engine = Engine(Resources(workers=workers))
    made = engine.shards(partial(meeting, tmp_path), items, lambda *progress, points=(): None, 0, at_once=2)
    assert sorted(made) == [item.sha256 for item in items]
    assert len(list(tmp_path.iterdir())) == 1  # the work is made once


def test_the_error_of_a_training_is_told_though_whoever_keeps_it_is_gone(two_cpus: None) -> None:
    actor = ray.remote(num_cpus=0)(progress_actor.ProgressActor).remote()
    ray.get(actor.take.remote())
    ray.kill(actor)
    with pytest.raises(ValueError, match="what the worker died of"), _told(actor):
        raise ValueError("what the worker died of")

    def worker(*, device: Any, report: Any, ending: Any) -> None:
        raise ConfigError("of ours")

    with pytest.raises(ConfigError, match="of ours"):
        _guarded(worker, actor, device=None)


@pytest.mark.parametrize("max_failures", [0, 3])
def test_workers_of_a_training_that_was_taken_over_are_ended(
    two_cpus: None, taken_over: StepDir, tmp_path: Path, max_failures: int
) -> None:
    engine = Engine(Resources(workers=1, max_failures=max_failures))
    with pytest.raises(FencedOffError, match="no longer ours: it is held by process 1 on elsewhere"):
        engine.train(partial(waits, tmp_path), taken_over, lambda *progress, points=(): None)
    check_ended(tmp_path)


def test_workers_that_are_to_begin_again_do_so_though_none_may_fail(
    two_cpus: None, step_dir: StepDir, tmp_path: Path
) -> None:
    def worker(*, device: Any, report: Any, ending: Any) -> None:
        (tmp_path / f"{len(list(tmp_path.glob('*.begun')))}.begun").touch()
        if len(list(tmp_path.glob("*.begun"))) < 3:
            raise BeginAgainError("memory is too small for micro_batch 4; next is 2")

    with step_dir.hold(False, print) as held:
        Engine(Resources(workers=1, max_failures=0)).train(worker, held, lambda *progress, points=(): None)
    assert len(list(tmp_path.glob("*.begun"))) == 3


def check_ended(folder: Path) -> None:
    """Check that the one worker that waited was ended, and none is in its place."""
    assert not (folder / "ended").exists()
    (worker,) = [int(path.stem) for path in folder.glob("*.begun")]
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_who_is_told_of_a_training_ends_it_by_an_error(two_cpus: None, step_dir: StepDir, tmp_path: Path) -> None:
    def worker(*, device: Any, report: Any, ending: Any) -> None:
        report(1, 2, "")
        waits(tmp_path)

    def enough(done: int, total: int, note: str, points: Any = ()) -> None:
        raise OverBudgetError(f"enough of {done}")

    with step_dir.hold(False, print) as held, pytest.raises(OverBudgetError, match="enough of 1"):
        Engine(Resources(workers=1)).train(worker, held, enough)
    check_ended(tmp_path)


def test_a_cluster_that_is_too_small_is_refused_unless_it_may_grow(two_cpus: None) -> None:
    said = r"workers is 3 with 1 CPU each, and this Ray has 2 CPU\. .*resources\.scale_up_minutes to how long"
    with pytest.raises(ConfigError, match=said):
        Engine(Resources(workers=3)).start()
    for resources, gpus, waited_for in (
        (Resources(workers=3, scale_up_minutes=1e-4), 0, "3 CPU; the cluster has 2 now"),
        (Resources(workers=2, gpus_per_worker=1, scale_up_minutes=1e-4), 1, "2 GPU; the cluster has 0 now"),
    ):
        heard: list[str] = []
        engine = Engine(resources)
        engine.told = heard.append
        with pytest.raises(LostError, match=f"did not grow .*waited for {waited_for}.*ray status"):
            engine.start(gpus)
        assert set(heard) == {f"waiting for {waited_for}"}
    engine.start()  # work on CPUs waits for no GPU
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


LEFT = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")


@pytest.mark.parametrize(
    ("failures", "kind", "said"),
    [
        ({0: ActorDiedError(), 1: LEFT}, LostError, "ActorDiedError"),
        ({0: LEFT, 1: ActorDiedError()}, LostError, "Connection closed by peer"),
        ({1: LEFT}, LostError, "Connection closed by peer"),
        ({1: torch.distributed.DistBackendError("NCCL")}, LostError, "NCCL"),
        ({1: RuntimeError("a bug near gloo/")}, UnforeseenError, "a bug near"),
        ({0: BeginAgainError("memory is too small"), 1: LEFT}, LostError, "memory is too small"),
        ({0: LEFT, 1: ValueError("a bug")}, UnforeseenError, "ValueError: a bug"),
    ],
)
def test_what_a_worker_says_that_another_one_left_is_no_bug(
    failures: dict[int, Exception], kind: type[Exception], said: str
) -> None:
    """So a trial of several workers is tried again."""
    with pytest.raises(kind, match=said), explained(None):
        raise WorkerGroupError("the group failed", failures)
