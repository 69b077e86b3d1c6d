"""Trials side by side by Ray Tune. What is tried, and what is remembered, the feed decides; Tune places and stops.

With `resources.workers: 0` trials run one by one in this process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from pipeline.config.resources import Resources
from pipeline.config.sweep import Asha
from pipeline.errors import BitmillError, BusyError, FencedOffError, LostError
from pipeline.execution.engine import Engine, explained, quiet, set_threads
from pipeline.store.step_store import StepDir

STEP, LOSS = "step", "validation_nats"
Report = Callable[[dict[str, Any]], None]
Work = Callable[[Any, Report], None]  # runs a trial; reports hold STEP and LOSS
PASSING = (BusyError, FencedOffError, LostError)  # the same command may fare better
GROUPS, ENDED, FAILURE = "groups", "ended", "failure"
A_BYTE = 1  # of memory: an actor that waits for training workers of its own needs no CPU, and Tune wants something


class Feed(Protocol):
    """Where trials come from and results go. All calls come from one thread."""

    def next(self) -> tuple[str, Any] | None:
        """Key of a trial to start and what the work is given, small and picklable; None: there are no more."""

    def reported(self, key: str, result: dict[str, Any]) -> None: ...

    def ended(self, key: str, status: str, failure: str) -> None:
        """`status`: done, stopped, failed (for a reason of its own), or lost (its workers were)."""


def run_trials(work: Work, feed: Feed, engine: Engine, place: StepDir, asha: Asha | None, at_once: int | None) -> None:
    """Run what the feed gives until it gives no more, at most `at_once` side by side.

    Raises:
        ConfigError: Ray cannot be reached, or has too few CPUs.
    """
    if engine.resources.workers == 0:
        while (given := feed.next()) is not None:
            key, trial = given
            result: dict[str, Any] = {}
            try:
                _tried(work, trial, partial(_heard, feed, key, result))
            except PASSING as error:
                feed.ended(key, "lost", str(error))
            else:
                feed.ended(key, *_outcome(result))
        return
    engine.start()
    with quiet(), explained(place):
        _tune(work, feed, engine, place, asha, at_once)


def _heard(feed: Feed, key: str, result: dict[str, Any], fresh: dict[str, Any]) -> None:
    result.update(fresh)
    feed.reported(key, fresh)


def _tune(work: Work, feed: Feed, engine: Engine, place: StepDir, asha: Asha | None, at_once: int | None) -> None:
    from ray import tune

    resources = engine.resources
    each = resources.workers * resources.cpus_per_worker
    fitting = _fitting(resources)  # more would wait for their workers, which the cap of worker-hours would count
    at_once = min(at_once or fitting, fitting)
    alone = resources.workers == 1  # trained inside the trial's own actor
    needs = {"cpu": each, "gpu": resources.gpus_per_worker} if alone else {"cpu": 0, "memory": A_BYTE}
    watcher = _watcher(_Here(feed))
    scheduler = None
    if asha is not None:
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr=STEP, grace_period=asha.grace_steps, reduction_factor=asha.reduction_factor, max_t=10**9
        )
    path, filesystem = place.run_folder()
    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, work=work, threads=max(1, int(resources.cpus_per_worker))), needs),
        tune_config=tune.TuneConfig(
            metric=LOSS,
            mode="min",
            search_alg=_search(_Here(feed)),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=alone,  # imports take seconds
        ),
        run_config=tune.RunConfig(
            storage_path=path,
            storage_filesystem=filesystem,
            name=f"ray-{place.fence}",
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        watcher.free_all()


def _fitting(resources: Resources) -> int:
    """Trials that the cluster has room for at once, one at least."""
    import ray

    there = ray.cluster_resources()
    needs = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return max(1, min(int(there.get(kind, 0) // (resources.workers * n)) for kind, n in needs.items() if n))


def _trial(config: dict[str, Any], work: Work, threads: int) -> None:
    from ray import tune

    set_threads(threads)
    logging.getLogger("ray").setLevel(logging.ERROR)
    _tried(work, config["trial"], tune.report)


def _tried(work: Work, trial: Any, report: Report) -> None:
    """Run a trial; its error comes back as its last result, unless trying again may help."""
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
    report({**last, ENDED: True, FAILURE: failure})


def _outcome(result: dict[str, Any]) -> tuple[str, str]:
    if not result.get(ENDED):
        return "stopped", ""
    return ("failed" if result[FAILURE] else "done"), str(result[FAILURE])


class _Here:
    """The feed, for what Tune pickles into its run folder, which must not go along."""

    def __init__(self, feed: Feed | None) -> None:
        self._feed = feed

    def __call__(self) -> Feed:
        if self._feed is None:
            raise RuntimeError("the feed is in the driver alone")
        return self._feed

    def __reduce__(self) -> tuple[Any, ...]:
        return _Here, (None,)


def _search(here: _Here) -> Any:
    from ray.tune.search import Searcher

    class Search(Searcher):  # type: ignore[misc]
        """Gives Tune what the feed gives."""

        def suggest(self, trial_id: str) -> Any:
            given = here().next()
            return Searcher.FINISHED if given is None else {"key": given[0], "trial": given[1]}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The watcher is told."""

        def save(self, checkpoint_path: str) -> None:
            """What was tried is in the sweep's own place."""

        def restore(self, checkpoint_path: str) -> None:
            """Never: a sweep goes on from its own place."""

    return Search(metric=LOSS, mode="min")


def _watcher(here: _Here) -> Any:
    from ray import tune

    class Watcher(tune.Callback):  # type: ignore[misc]
        """Tells the feed, and removes the placement groups of a trial that ended: Tune does not see those that Ray
        Train made inside it, and they would keep their CPUs."""

        def __init__(self) -> None:
            self._groups: dict[str, set[str]] = {}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **more: Any) -> None:
            self._groups.setdefault(trial.trial_id, set()).update(result.get(GROUPS, ()))
            here().reported(trial.config["key"], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)
            here().ended(trial.config["key"], *_outcome(trial.last_result or {}))

        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
            self._free(trial.trial_id)
            error = trial.get_pickled_error() if trial.pickled_error_file else None
            here().ended(
                trial.config["key"], "lost", str(error).strip().splitlines()[-1] if error else "its worker died"
            )

        def free_all(self) -> None:
            for trial_id in list(self._groups):
                self._free(trial_id)

        def _free(self, trial_id: str) -> None:
            for group in self._groups.pop(trial_id, ()):
                _remove(group)

    return Watcher()


def _remove(group: str) -> None:
    from ray._raylet import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    with contextlib.suppress(Exception):  # it may be gone
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
