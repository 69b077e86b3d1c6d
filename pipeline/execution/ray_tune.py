"""Trials side by side by Ray Tune. What is tried, and what is remembered, the source decides; Tune places and stops.

With `resources.workers: 0` trials run one by one in this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.resources import Resources
from pipeline.errors import BitmillError, BusyError, FencedOffError, LostError
from pipeline.execution.engine import Engine, explained, quiet, set_threads
from pipeline.execution.progress_actor import Lookout, remove_groups
from pipeline.store.lease import Owner
from pipeline.store.step_store import StepDir

STEP, LOSS = "step", "validation_nats"
ReportResult = Callable[[dict[str, Any]], None]
Work = Callable[[Any, ReportResult], None]  # runs a trial; reports hold STEP and LOSS
PASSING = (BusyError, FencedOffError, LostError)  # the same command may fare better
FOLDER, OWNER = "bitmill-tune-", "owner.json"
GROUPS, ENDED, FAILURE = "groups", "ended", "failure"
A_BYTE = 1  # of memory: an actor that waits for training workers of its own needs no CPU, and Tune wants something


class TrialSource(Protocol):
    """The source of trials, which also takes their results. All calls come from one thread."""

    def next(self) -> tuple[str, Any] | None:
        """Return the key of a trial to start and what its work is given, small and picklable; None: no more come."""

    def reported(self, key: str, result: dict[str, Any]) -> None:
        """Take a result that a trial reports."""

    def goes_on(self, key: str, step: int, nats: float) -> bool:
        """Tell whether a trial goes on after the validation that it reports; else it is stopped."""

    def ended(self, key: str, status: str, failure: str) -> None:
        """Take the end of a trial. `status`: done, stopped, failed (for its own reason), or lost (its workers were)."""


def run_trials(work: Work, source: TrialSource, engine: Engine, step_dir: StepDir, at_once: int | None) -> None:
    """Run what the source gives until it gives no more, at most `at_once` side by side. One by one none is stopped.

    Raises:
        ConfigError: Ray cannot be reached, or has too few CPUs.
    """
    if engine.resources.workers == 0:
        while (given := source.next()) is not None:
            key, trial = given
            try:
                result = _tried(work, trial, partial(source.reported, key))
            except PASSING as error:
                source.ended(key, "lost", str(error))
            else:
                source.ended(key, *_outcome(result))
        return
    engine.start(engine.resources.gpus_per_worker)
    with quiet(), explained(step_dir), own_folder() as folder:
        _tune(work, source, engine, folder, at_once, step_dir)


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """Yield a folder for Tune, and take away those of processes that were killed.

    Tune pickles its state and the errors of trials, and reads errors back, so it lies nowhere that others may write to:
    not in a store, whose scratch a group may share, but where each takes away only what is its own.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        if _is_left(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        (Path(folder) / OWNER).write_text(json.dumps(asdict(Owner.this_process())))
        yield folder


def _is_left(folder: Path) -> bool:
    try:
        return Owner(**json.loads((folder / OWNER).read_bytes())).gone()
    except (OSError, ValueError, TypeError):  # somebody else's, or just made
        return False


def _tune(work: Work, source: TrialSource, engine: Engine, folder: str, at_once: int | None, step_dir: StepDir) -> None:
    from ray import tune

    resources = engine.resources
    each = resources.workers * resources.cpus_per_worker
    at_once = _fitting(resources, at_once)
    alone = resources.workers == 1  # trained inside the trial's own actor
    needs = {"cpu": each, "gpu": resources.gpus_per_worker} if alone else {"cpu": 0, "memory": A_BYTE}
    in_driver = _InDriver(source)
    watcher = _watcher(in_driver, Lookout(step_dir))
    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, work=work, threads=max(1, int(resources.cpus_per_worker))), needs),
        tune_config=tune.TuneConfig(
            metric=LOSS,
            mode="min",
            search_alg=_search(in_driver),
            scheduler=_scheduler(in_driver),
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=alone,  # imports take seconds
        ),
        run_config=tune.RunConfig(
            storage_path=folder,
            name=Path(folder).name,  # under which the session of a cluster keeps drafts of all its drivers
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if in_driver.failure is None:
            raise
    finally:
        watcher.free_all()
    if in_driver.failure is not None:
        raise in_driver.failure


def _fitting(resources: Resources, at_once: int | None) -> int:
    """Return how many trials run at once: as many as the cluster has room for, one at least, and `at_once` at most;
    just as many on a cluster that may grow, which it does for trials that wait."""
    import ray

    if at_once is not None and resources.scale_up_minutes:
        return at_once
    there = ray.cluster_resources()
    needs = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    fitting = max(1, min(int(there.get(kind, 0) // (resources.workers * n)) for kind, n in needs.items() if n))
    return min(at_once or fitting, fitting)  # more would wait for workers, which the cap of worker-hours would count


def _trial(config: dict[str, Any], work: Work, threads: int) -> None:
    from ray import tune

    set_threads(threads)
    logging.getLogger("ray").setLevel(logging.ERROR)
    _tried(work, config["trial"], tune.report)


def _tried(work: Work, trial: Any, report: ReportResult) -> dict[str, Any]:
    """Run a trial and return its last result, which holds its error, unless trying again may help."""
    last: dict[str, Any] = {STEP: 0, LOSS: float("inf")}

    def remember(result: dict[str, Any]) -> None:
        last.update({STEP: result[STEP], LOSS: result[LOSS]})
        report(result)

    failure = ""
    try:
        with explained(None, "The trial"):
            work(trial, remember)
    except PASSING:
        raise
    except BitmillError as error:
        failure = str(error)
    last |= {ENDED: True, FAILURE: failure}
    report(last)
    return last


def _outcome(result: dict[str, Any]) -> tuple[str, str]:
    if not result.get(ENDED):
        return "stopped", ""
    return ("failed" if result[FAILURE] else "done"), str(result[FAILURE])


class _InDriver:
    """The source of trials, for what Tune pickles into its run folder, which must not go along; and the error that it
    raised, of which Tune makes a text."""

    def __init__(self, source: TrialSource | None) -> None:
        self._source = source
        self.failure: BitmillError | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[TrialSource]:
        if self._source is None:
            raise RuntimeError("the source is in the driver alone")
        try:
            yield self._source
        except BitmillError as error:
            self.failure = self.failure or error
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _InDriver, (None,)


def _search(source_of: _InDriver) -> Any:
    from ray.tune.search import Searcher

    class Search(Searcher):  # type: ignore[misc]
        """Gives Tune what the source gives."""

        def suggest(self, trial_id: str) -> Any:
            with source_of() as source:
                given = source.next()
            return Searcher.FINISHED if given is None else {"key": given[0], "trial": given[1]}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Do nothing: the watcher is told."""

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: what was tried is in the sweep's own step directory, from which a sweep goes on."""

        restore = save

    return Search(metric=LOSS, mode="min")


def _scheduler(source_of: _InDriver) -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Scheduler(FIFOScheduler):  # type: ignore[misc]
        """Stops the trials that the source does not want to go on."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            with source_of() as source:
                on = result.get(ENDED) or source.goes_on(trial.config["key"], result[STEP], result[LOSS])
            return str(TrialScheduler.CONTINUE if on else TrialScheduler.STOP)

    return Scheduler()


def _watcher(source_of: _InDriver, lookout: Lookout) -> Any:
    from ray import tune

    class Watcher(tune.Callback):  # type: ignore[misc]
        """Tells the source, and removes the placement groups of a trial that ended: Tune does not see those that Ray
        Train made inside it, and they would keep their CPUs. While trials say nothing, it sees whether the sweep was
        taken over."""

        def __init__(self) -> None:
            self._groups: dict[str, set[str]] = {}

        def on_step_begin(self, iteration: int, trials: Any, **more: Any) -> None:
            with source_of():
                lookout.look()

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **more: Any) -> None:
            self._groups.setdefault(trial.trial_id, set()).update(result.get(GROUPS, ()))
            with source_of() as source:
                source.reported(trial.config["key"], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)
            with source_of() as source:
                source.ended(trial.config["key"], *_outcome(trial.last_result or {}))

        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)
            why = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1]
            with source_of() as source:
                source.ended(trial.config["key"], "lost", why)

        def free_all(self) -> None:
            """Remove the placement groups of all trials."""
            for trial_id in list(self._groups):
                self._free(trial_id)

        def _free(self, trial_id: str) -> None:
            remove_groups(self._groups.pop(trial_id, ()))

    return Watcher()
