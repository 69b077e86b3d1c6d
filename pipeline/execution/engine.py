"""Work on Ray: shards by Ray Data, training by Ray Train, plain work as tasks, one `ray.init` a command.

With `resources.workers: 0` everything runs in this process and Ray is never started. Work travels as small
picklable values (step directories, recipes); the driver never holds data.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Protocol, TypeVar

from pipeline.config.base import Closed
from pipeline.config.resources import Resources
from pipeline.errors import ERRORS, BeginAgainError, BitmillError, ConfigError, LostError, UnforeseenError
from pipeline.execution.progress_actor import LOOK_S, Lookout, asked, beside_driver, delivered, send
from pipeline.execution.room import await_room, check_room
from pipeline.execution.signals import Signals
from pipeline.store.records import Advance
from pipeline.store.step_store import StepDir

T = TypeVar("T")
Item = TypeVar("Item", bound=Closed)


class Worker(Protocol):
    """The work that every rank of a training group runs."""

    def __call__(self, *, device: Any, report: Advance, ending: Callable[[], bool]) -> None: ...


class Engine:
    """Runs a stage's work on this machine or a cluster; Ray starts when it is first needed."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.groups: set[str] = set()  # ids of the placement groups that trained
        self.told: Callable[[str], None] = lambda said: None  # hears what is waited for
        self._started = False

    def shards(
        self,
        make: Callable[[], Callable[[Item], str]],
        items: Sequence[Item],
        advance: Advance,
        gpus: float,
        step_dir: StepDir | None = None,
        at_once: int = 1,
    ) -> Iterator[str]:
        """Call `make()(item)` for every item on a pool of actors; yield what the calls return.

        An actor makes its work once; one that dies is replaced and its items are done again. Order is not kept. Of an
        actor's calls so many run at once, in threads of their own.

        Raises:
            FencedOffError: the step that they are of was taken over.
        """
        here = self.resources.workers == 0
        results = _in_threads(make(), items, at_once) if here else self._on_actors(make, items, gpus, at_once)
        lookout = Lookout(step_dir)
        for done, result in enumerate(results, start=1):
            lookout.look()
            advance(done, len(items), "")
            yield result

    @contextlib.contextmanager
    def relayed(self, note: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
        """Yield a function by which work says what it does, wherever it runs; of many notes at once the last counts."""
        if self.resources.workers == 0:
            yield note
            return

        self.start()
        actor = beside_driver()
        with delivered(actor, lambda done, total, said, points=(): note(said), self.groups):
            yield partial(send, actor, 0, 0)

    def train(self, worker: Worker, step_dir: StepDir, advance: Advance) -> None:
        """Run `worker(device=..., report=..., ending=...)` on every rank of a training group. `ending` tells that the
        worker is about to be ended, which is then for it to use: the node goes away, or this process was asked to end,
        which it does once the worker has reported again.

        Raises:
            FencedOffError: the step was taken over; its workers are ended, as they are by an error that `advance`
                raises.
        """
        from ray import cloudpickle
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        class Trainer(TorchTrainer):  # type: ignore[misc]
            """Leaves Ctrl-C to us: Ray's own handler ends the process with status 0, or leaves the command waiting."""

            def _register_sigint_handler(self, controller: Any) -> None: ...

        resources = self.resources
        path, filesystem = step_dir.run_folder()
        # A folder of this attempt: our checkpoints say where to go on, and a killed driver's workers may still write.
        run = RunConfig(storage_path=path, storage_filesystem=filesystem, name="ray")
        actor = None
        signals = Signals(advance)
        work: Callable[[], Callable[..., None]] = partial(partial, worker, report=signals.report, ending=signals.came)
        workers: dict[str, Any] = {"num_workers": 0}
        if resources.workers:
            self.start(resources.gpus_per_worker)
            actor = beside_driver()
            # Sealed, so that Ray's controller does not import what only the workers need.
            work = partial(cloudpickle.loads, cloudpickle.dumps(partial(_guarded, worker, actor)))
            workers = {
                "num_workers": (least, resources.workers) if (least := resources.min_workers) else resources.workers,
                # More are taken after a checkpoint that was made with fewer: taking them ends the group unannounced.
                "elastic_resize_monitor_interval_s": 60 * (resources.checkpoint_minutes + 1),
                "use_gpu": resources.gpus_per_worker > 0,
                "resources_per_worker": {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
            }
            run.failure_config = FailureConfig(max_failures=resources.max_failures)
        config = {"work": work, "threads": self._threads(), "resources": resources}
        held_back = signals if actor is None else contextlib.nullcontext()
        with quiet(), delivered(actor, advance, self.groups, step_dir), explained(step_dir), _told(actor), held_back:
            scaling = ScalingConfig(**workers)
            trainer = Trainer(_train_worker, train_loop_config=config, scaling_config=scaling, run_config=run)
            while not _fitted(trainer):
                pass  # with what a worker found out

    def task(self, work: Callable[[], T], step_dir: StepDir, gpus: float = 0) -> T:
        """Run `work()` as one plain task, in this process if Ray would start for it alone; return what it gives."""
        if self._can_spare_ray():
            import torch

            before = torch.get_num_threads()
            set_threads(self._threads())  # as a worker computes, so that no bit tells where it was
            try:
                with explained(step_dir):
                    return work()
            finally:
                set_threads(before)
        return self.tasks([work], step_dir, lambda *progress, points=(): None, gpus)[0]

    def tasks(self, work: Sequence[Callable[[], T]], step_dir: StepDir, advance: Advance, gpus: float) -> list[T]:
        """Run each piece of work as a plain task, `resources.workers` at a time; return what they give, in order.

        Raises:
            FencedOffError: the step was taken over; what runs is not waited for, and stores nothing more.
        """
        lookout = Lookout(step_dir)
        if self.resources.workers == 0:
            given = []
            for done, piece in enumerate(work, start=1):
                lookout.look()
                given.append(piece())
                advance(done, len(work), "")
            return given
        import ray

        self.start(gpus)
        # Outside the placement group of a trial that asks, which holds no CPU.
        options = {"num_cpus": self.resources.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
        remote = ray.remote(**options)(_task_worker)
        with explained(step_dir):
            results: dict[int, T] = {}
            left = list(enumerate(work))
            running: dict[Any, int] = {}
            while left or running:
                while left and len(running) < self.resources.workers:
                    index, piece = left.pop(0)
                    running[remote.remote(piece, self._threads())] = index
                ready, _ = ray.wait(list(running), timeout=LOOK_S)
                lookout.look()
                if not ready:
                    continue
                result, failure = ray.get(ready[0])
                if failure:  # the others end by themselves: Ray 2.60 aborts if one is cancelled that just ends
                    raise ERRORS[failure](result)
                results[running.pop(ready[0])] = result
                advance(len(results), len(work), "")
            return [results[index] for index in range(len(work))]

    def _can_spare_ray(self) -> bool:
        """Tell whether Ray would start on this machine, has CPUs enough there, and is not asked for a GPU."""
        import ray

        resources = self.resources
        enough = 0 < resources.workers * resources.cpus_per_worker <= (os.cpu_count() or 1)
        return enough and not (resources.gpus_per_worker or resources.ray_address or ray.is_initialized())

    def close(self) -> None:
        """Stop Ray, if it was reached or started here."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _on_actors(
        self, make: Callable[[], Callable[[Item], str]], items: Sequence[Item], gpus: float, at_once: int
    ) -> Iterator[str]:
        import ray.data

        self.start(gpus)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"item": item.model_dump_json()} for item in items], override_num_blocks=len(items))
        size = max(1, min(self.resources.workers, len(items)))
        threads = {"enable_true_multi_threading": True, "max_concurrent_calls_per_actor": at_once}
        pool = ray.data.ActorPoolStrategy(size=size, **threads)
        with quiet(), explained(None):
            results = rows.map(
                _ShardWorker,
                fn_constructor_kwargs={"make": make, "kind": type(items[0]), "threads": self._threads()},
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

    def start(self, gpus: float = 0) -> None:
        """Reach or start Ray. With `resources.scale_up_minutes`, wait for nodes where workers that take so many GPUs
        each do not fit into those that are there.

        Raises:
            ConfigError: it cannot be reached, or has too few CPUs or GPUs, and is not to grow.
            LostError: it did not start, or grow, in time.
        """
        reached = self._started
        if not reached:
            self._reach()
        if self.resources.scale_up_minutes:
            await_room(self.resources, gpus, self.told)
        elif not reached:
            check_room(self.resources)

    def _reach(self) -> None:
        import ray

        resources = self.resources
        if not ray.is_initialized():
            logging.getLogger("ray").setLevel(logging.ERROR)
            # With the dashboard off, Ray Train's placement group cleaner logs an error every second.
            terminated = signal.getsignal(signal.SIGTERM)
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
            if callable(terminated) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray's own aborts the process three seconds later


def _in_threads(work: Callable[[Item], str], items: Sequence[Item], at_once: int) -> Iterator[str]:
    """Yield what calls return, in order; with more than one at once, each runs in a thread."""
    if at_once == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(work, items)


class _ShardWorker:
    """An actor's life: build the work once, then one item a call.

    An error of ours comes back as a value: Ray Data would wrap it, say its own piece, and lose its type.
    """

    def __init__(self, make: Callable[[], Callable[[Any], str]], kind: type[Closed], threads: int) -> None:
        set_threads(threads)
        self._make, self._kind, self._making = cache(make), kind, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            with self._making:
                work = self._make()
            return {"result": work(self._kind.model_validate_json(row["item"])), "failure": ""}
        except BitmillError as error:
            return {"result": str(error), "failure": type(error).__name__}


def _train_worker(config: dict[str, Any]) -> None:
    import ray.train.torch

    from pipeline.models.device import device_for  # imports torch, which Ray's controller need not

    set_threads(config["threads"])
    resources = config["resources"]
    config["work"]()(device=ray.train.torch.get_device() if resources.workers else device_for(resources))


def _guarded(worker: Worker, actor: Any, device: Any) -> None:
    """Run a worker. An error of ours comes back however often it is tried, so Ray's next attempt ends at once."""
    from ray.util import get_current_placement_group

    if asked(actor.failure.remote()) is not None:
        return
    if (group := get_current_placement_group()) is not None:
        actor.runs_in.remote(group.id.hex())  # for whoever stops this from outside to remove it; Ray Train leaves it
    try:
        worker(device=device, report=partial(send, actor), ending=_leaves)
    except BitmillError as error:
        asked(actor.fail.remote(error))
        raise


def _leaves() -> bool:
    """Tell whether the node of a worker of this group goes away: it is drained, as Kubernetes' and clouds' notices make
    Ray do. Ray Train restarts the group once it is gone, and counts that as no failure."""
    from ray.train.v2._internal.execution.context import get_train_context

    # `ray.train.get_preemption_info` says the same, and has all workers wait for one another.
    return get_train_context().preemption_context.preemption_info is not None


def _fitted(trainer: Any) -> bool:
    """Train; return False if the workers are to begin again, which to Ray is a failure among `max_failures`."""
    try:
        trainer.fit()
    except Exception as error:
        if not any(isinstance(e, BeginAgainError) for e in _chain(error)):
            raise
        return False
    return True


@contextlib.contextmanager
def _told(actor: Any) -> Iterator[None]:
    """Raise what the actor was told, by a worker or by whoever ended them, in place of what Ray makes of it."""
    ray_error: Exception | None = None
    try:
        yield
    except Exception as error:
        ray_error = error
    failure = asked(actor.failure.remote()) if actor is not None else None
    if failure is not None:
        raise failure from ray_error
    if ray_error is not None:
        raise ray_error


def _task_worker(work: Callable[[], T], threads: int) -> tuple[T | str, str]:
    """Return what the work gives; an error of ours as its message and its name, which Ray would wrap in a traceback."""
    set_threads(threads)
    try:
        return work(), ""
    except BitmillError as error:
        return str(error), type(error).__name__


def set_threads(threads: int) -> None:
    """Set how many threads torch computes with."""
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Ray's libraries while inside: they log each start and stop at INFO; our progress says what matters."""
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
def explained(step_dir: StepDir | None, what: str = "A shard's worker") -> Iterator[None]:
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
        causes = [e for e in _chain(error) if not _inner(e)]
        cause = next((e for e in causes if not _passes(e)), causes[0])  # what one worker met tells others nothing
        kind = LostError if _passes(cause) else UnforeseenError
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
        where = f"The {step_dir.stage} step {step_dir.key}" if step_dir is not None else what
        raise kind(
            f"{where} failed: {type(cause).__name__}: {lines[-1]}. What was committed is kept; the same "
            "command goes on from there. --debug shows the traceback."
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and all that it wraps, outermost first."""
    chain = [error]
    for current in chain:  # which grows
        chain += [e for e in _inner(current) if e not in chain]
    return chain


def _inner(error: BaseException) -> list[BaseException]:
    """Return what an error wraps."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [getattr(error, "cause", None), error.__cause__, *failures.values()]
    return [e for e in dict.fromkeys(inner) if isinstance(e, BaseException)]


def _passes(error: BaseException) -> bool:
    """Tell whether an error at the bottom may pass: of Ray, of a disk or a network, of a group that is to begin again,
    or of a worker that another one left, as torch says it."""
    ours, theirs = isinstance(error, OSError | BeginAgainError), type(error).__module__.partition(".")[0] == "ray"
    left = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # gloo has no class of its own
    return ours or theirs or left or (type(error) is RuntimeError and "/gloo/transport/" in str(error))
