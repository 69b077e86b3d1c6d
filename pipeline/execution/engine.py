"""The only Ray: shards by Ray Data, training by Ray Train, plain work as tasks, one `ray.init` a command.

With `resources.workers: 0` everything runs in this process and Ray is never started. Work travels as small
picklable values (places, recipes); the driver never holds data.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from pipeline.config.base import Closed
from pipeline.config.resources import Resources
from pipeline.errors import ERRORS, BitmillError, ConfigError, LostError, UnforeseenError
from pipeline.execution.progress_actor import Sender, delivered, mailbox_for_workers
from pipeline.store.records import Advance
from pipeline.store.step_store import StepDir

T = TypeVar("T")


class Engine:
    """Runs a stage's work on this machine or a cluster; Ray starts when it is first needed."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.groups: set[str] = set()  # ids of the placement groups that trained
        self._started = False

    def shards(
        self, work: type, settings: dict[str, Any], items: Sequence[Closed], advance: Advance, gpus: float
    ) -> Iterator[str]:
        """Call `work(**settings)(item)` for every item on a pool of actors; yields what the calls return.

        An actor makes one `work`; one that dies is replaced and its items are done again. Order is not kept.
        """
        if self.resources.workers == 0:
            results: Iterator[str] = map(work(**settings), items)
        else:
            results = self._on_actors(work, settings, items, gpus)
        for done, result in enumerate(results, start=1):
            advance(done, len(items), "")
            yield result

    def train(self, worker: Callable[..., None], settings: dict[str, Any], place: StepDir, advance: Advance) -> None:
        """Run `worker(**settings, device=..., report=...)` on every rank of a training group."""
        from ray import cloudpickle
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        resources = self.resources
        path, filesystem = place.run_folder()
        # A fresh name each attempt: our checkpoints say where to go on, and a killed driver's workers may still write.
        run = RunConfig(storage_path=path, storage_filesystem=filesystem, name=f"ray-{place.fence}")
        mailbox = None
        work: Callable[[], Callable[..., None]] = partial(partial, worker, **settings, report=advance)
        workers: dict[str, Any] = {"num_workers": 0}
        if resources.workers:
            self.start()
            mailbox = mailbox_for_workers()
            # Sealed, so that Ray's controller does not import what only the workers need.
            work = partial(cloudpickle.loads, cloudpickle.dumps(partial(_guarded, worker, settings, Sender(mailbox))))
            workers = {
                "num_workers": resources.workers,
                "use_gpu": resources.gpus_per_worker > 0,
                "resources_per_worker": {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
            }
            run.failure_config = FailureConfig(max_failures=resources.max_failures)
        config = {"work": work, "threads": self._threads()}
        with quiet(), delivered(mailbox, advance, self.groups), explained(place):
            scaling = ScalingConfig(**workers)
            TorchTrainer(_train_worker, train_loop_config=config, scaling_config=scaling, run_config=run).fit()
            _raise_failure(mailbox)

    def task(self, work: Callable[..., T], settings: dict[str, Any], place: StepDir) -> T:
        """Run `work(**settings)` as one plain task."""
        return self.tasks(work, [settings], place, lambda *progress, points=(): None, gpus=0)[0]

    def tasks(
        self,
        work: Callable[..., T],
        settings: Sequence[dict[str, Any]],
        place: StepDir,
        advance: Advance,
        gpus: float,
    ) -> list[T]:
        """Run `work(**one)` for each of the settings as plain tasks, `resources.workers` at a time; what they give, in
        order."""
        if self.resources.workers == 0:
            found = []
            for done, one in enumerate(settings, start=1):
                found.append(work(**one))
                advance(done, len(settings), "")
            return found
        import ray

        self.start()
        # Outside the placement group of a trial that asks, which holds no CPU.
        how = {"num_cpus": self.resources.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
        remote = ray.remote(**how)(_task_worker)
        with explained(place):
            results: dict[int, T] = {}
            left = list(enumerate(settings))
            running: dict[Any, int] = {}
            while left or running:
                while left and len(running) < self.resources.workers:
                    index, one = left.pop(0)
                    running[remote.remote(work, one, self._threads())] = index
                ready = ray.wait(list(running))[0][0]
                result, failure = ray.get(ready)
                if failure:  # the others end by themselves: Ray 2.60 aborts if one is cancelled that just ends
                    raise ERRORS[failure](result)
                results[running.pop(ready)] = result
                advance(len(results), len(settings), "")
            return [results[index] for index in range(len(settings))]

    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _on_actors(self, work: type, settings: dict[str, Any], items: Sequence[Closed], gpus: float) -> Iterator[str]:
        import ray.data

        self.start()
        ray.data.DataContext.get_current().enable_progress_bars = False
        written = [{"item": item.model_dump_json()} for item in items]
        rows = ray.data.from_items(written, override_num_blocks=len(items))
        pool = ray.data.ActorPoolStrategy(size=max(1, min(self.resources.workers, len(items))))
        with quiet(), explained(None):
            results = rows.map(
                _ShardWorker,
                fn_constructor_kwargs={
                    "work": work,
                    "settings": settings,
                    "kind": type(items[0]),
                    "threads": self._threads(),
                },
                compute=pool,
                num_cpus=self.resources.cpus_per_worker,
                num_gpus=gpus,
            )
            for row in results.iter_rows():
                if row["failure"]:
                    raise ERRORS[str(row["failure"])](str(row["result"]))
                yield str(row["result"])

    def _threads(self) -> int:
        return max(1, int(self.resources.cpus_per_worker))

    def start(self) -> None:
        """Reach or start Ray.

        Raises:
            ConfigError: it cannot be reached, or has too few CPUs or GPUs.
            LostError: it did not start in time.
        """
        import ray

        if self._started:
            return
        resources = self.resources
        if not ray.is_initialized():
            logging.getLogger("ray").setLevel(logging.ERROR)
            # With the dashboard off, Ray Train's placement group cleaner logs an error every second.
            local = {} if resources.ray_address else {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
            try:
                ray.init(
                    address=resources.ray_address or "local",
                    namespace=resources.namespace or "bitmill",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **local,
                )
            except Exception as error:
                # What Ray raises when a part of the node that it starts is late; for the node itself just Exception.
                late = () if resources.ray_address else (RuntimeError, TimeoutError)
                if type(error) is Exception or isinstance(error, late):
                    raise LostError(
                        f"Ray did not start: {error} What was committed is kept; run the same command again."
                    ) from error
                if not isinstance(error, (OSError, RuntimeError, ValueError)):
                    raise
                raise ConfigError(
                    f"Ray cannot be reached at {resources.ray_address or 'this machine'}: {error}. Set RAY_ADDRESS or "
                    "resources.ray_address to a running cluster, or leave both out."
                ) from error
            self._started = True
        available = ray.cluster_resources()
        for kind, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
            if resources.workers * each > available.get(kind, 0):
                raise ConfigError(
                    f"resources.workers is {resources.workers} with {each:g} {kind} each, and this Ray has "
                    f"{available.get(kind, 0):g} {kind}. Lower resources.workers or {kind.lower()}s_per_worker."
                )


class _ShardWorker:
    """An actor's life: build the work once, then one item a call.

    An error of ours comes back as a value: Ray Data would wrap it, say its own piece, and lose its type.
    """

    def __init__(self, work: type, settings: dict[str, Any], kind: type[Closed], threads: int) -> None:
        set_threads(threads)
        self._build = partial(work, **settings)
        self._work: Callable[[Closed], str] | None = None
        self._kind = kind

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._work is None:
                self._work = self._build()
            return {"result": self._work(self._kind.model_validate_json(row["item"])), "failure": ""}
        except BitmillError as error:
            return {"result": str(error), "failure": type(error).__name__}


def _train_worker(config: dict[str, Any]) -> None:
    import ray.train.torch

    set_threads(config["threads"])
    config["work"]()(device=ray.train.torch.get_device())


def _guarded(worker: Callable[..., None], settings: dict[str, Any], report: Sender, device: Any) -> None:
    """Run a worker. An error of ours comes back however often it is tried, so Ray's next attempt ends at once."""
    if report.failure() is not None:
        return
    _tell_group(report)
    try:
        worker(**settings, device=device, report=report)
    except BitmillError as error:
        report.fail(error)
        raise


def _tell_group(report: Sender) -> None:
    """Whoever stops this training from outside has to remove the placement group, which Ray Train then leaves."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is not None:
        report.runs_in(group.id.hex())


def _raise_failure(mailbox: Any) -> None:
    import ray

    failure = ray.get(mailbox.failure.remote()) if mailbox is not None else None
    if failure is not None:
        raise failure


def _task_worker(work: Callable[..., T], settings: dict[str, Any], threads: int) -> tuple[T | str, str]:
    """What the work gives; an error of ours as its message and its name, which Ray would wrap in a traceback."""
    set_threads(threads)
    try:
        return work(**settings), ""
    except BitmillError as error:
        return str(error), type(error).__name__


def set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray's libraries log each start and stop at INFO; our own progress says what matters."""
    names = ("ray.train", "ray.data", "ray.tune", "ray")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def explained(place: StepDir | None, what: str = "A shard's worker") -> Iterator[None]:
    """Turn what Ray wraps around a worker's error back into the error; `what` failed, if it is no single step."""
    try:
        yield
    except Exception as error:
        # The very types: Ray also makes classes that are both its own error and ours, and say a traceback.
        ours = next((e for e in _chain(error) if type(e) in ERRORS.values()), None)
        if ours is error:
            raise
        if isinstance(ours, BitmillError):
            raise type(ours)(str(ours)) from error
        cause = _chain(error)[-1]
        lost = type(cause).__module__.partition(".")[0] == "ray" or isinstance(cause, OSError)
        kind = LostError if lost else UnforeseenError
        where = f"The {place.stage} step {place.key}" if place is not None else what
        raise kind(
            f"{where} failed: {type(cause).__name__}: {_first_line(cause)}. What was committed is kept; the same "
            "command goes on from there. --debug shows the traceback."
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    """An error and all that it wraps, outermost first."""
    found: list[BaseException] = []
    pending: list[BaseException] = [error]
    while pending:
        current = pending.pop(0)
        if current in found:
            continue
        found.append(current)
        failures = getattr(current, "worker_failures", None) or {}
        inner = [getattr(current, "cause", None), current.__cause__, *failures.values()]
        pending += [e for e in inner if isinstance(e, BaseException)]
    return found


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
