"""Whether a cluster has room for a command's workers; an autoscaler is asked for more, and waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, LostError

POLL_S = 1.0


def check_room(resources: Resources) -> None:
    """Raise ConfigError if not even the least workers fit into the nodes that are there."""
    short = _shortage(resources, resources.gpus_per_worker)
    if short is not None:
        kind, each, there = short
        knob = _knob(resources)
        raise ConfigError(
            f"{knob} is {resources.least_workers} with {each:g} {kind} each, and this Ray has {there:g} {kind}. "
            f"Lower {knob} or {kind.lower()}s_per_worker; or, on a cluster with an autoscaler, set "
            "resources.scale_up_minutes to how long to wait for nodes."
        )


def await_room(resources: Resources, gpus: float, told: Callable[[str], None]) -> None:
    """Wait until the least workers, with so many GPUs each, fit into the nodes that are there, and say so meanwhile. A
    placement group that is pending is what an autoscaler adds nodes for; where they are there, it goes.

    Raises:
        LostError: they do not after `resources.scale_up_minutes`.
    """
    short, knob = _shortage(resources, gpus), _knob(resources)
    if short is None:
        return
    from ray.util import placement_group, remove_placement_group

    bundle = {kind: each for kind, each in _each(resources, gpus).items() if each}
    group = placement_group([bundle] * resources.workers)
    end = time.monotonic() + 60 * resources.scale_up_minutes
    try:
        while short is not None:
            kind, each, there = short
            waited_for = f"{resources.least_workers * each:g} {kind}; the cluster has {there:g} now"
            told(f"waiting for {waited_for}")
            if time.monotonic() >= end:
                raise LostError(
                    f"The cluster did not grow in resources.scale_up_minutes ({resources.scale_up_minutes:g}): waited "
                    f"for {waited_for}. What was committed is kept; run the same command again, with more minutes or "
                    f"a lower {knob}, or see by `ray status` why the autoscaler adds no nodes."
                )
            time.sleep(POLL_S)
            short = _shortage(resources, gpus)
    finally:
        remove_placement_group(group)


def _shortage(resources: Resources, gpus: float) -> tuple[str, float, float] | None:
    """Return what the nodes have too little of, what each worker needs of it, and what there is; None: nothing."""
    import ray

    there = ray.cluster_resources()
    for kind, each in _each(resources, gpus).items():
        if resources.least_workers * each > there.get(kind, 0):
            return kind, each, there.get(kind, 0)
    return None


def _knob(resources: Resources) -> str:
    return "resources.workers" if resources.min_workers is None else "resources.min_workers"


def _each(resources: Resources, gpus: float) -> dict[str, float]:
    return {"CPU": resources.cpus_per_worker, "GPU": gpus}
