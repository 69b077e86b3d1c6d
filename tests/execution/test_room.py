"""When workers that do not fit are refused, and when nodes are asked for and waited for, on a cluster of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError, LostError
from pipeline.execution import room
from pipeline.execution.ray_tune import _fitting
from pipeline.execution.room import await_room, check_room


class Cluster:
    """A cluster whose resources are another at each look, the last ones for ever; and what it was asked for."""

    def __init__(self, *looks: dict[str, float]) -> None:
        self.looks, self.asked, self.removed = list(looks), list[Any](), list[Any]()

    def resources(self) -> dict[str, float]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    there = Cluster({})
    monkeypatch.setattr(room, "POLL_S", 0.0)
    monkeypatch.setattr(ray, "cluster_resources", there.resources)
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles: there.asked.append(bundles) or bundles)
    monkeypatch.setattr(ray.util, "remove_placement_group", there.removed.append)
    yield there
    assert there.removed == there.asked  # nothing is asked for any more


def test_what_does_not_fit_is_refused_with_the_knobs(cluster: Cluster) -> None:
    cluster.looks = [{"CPU": 4.0}]
    check_room(Resources(workers=2, cpus_per_worker=2))
    with pytest.raises(
        ConfigError, match=r"workers is 3 with 2 CPU each, and this Ray has 4 CPU\. Lower .*scale_up_mi"
    ):
        check_room(Resources(workers=3, cpus_per_worker=2))
    with pytest.raises(ConfigError, match=r"1 GPU each, and this Ray has 0 GPU\. .* or gpus_per_worker"):
        check_room(Resources(gpus_per_worker=1))
    assert cluster.asked == []


def test_training_that_makes_do_with_fewer_workers_needs_room_for_those(cluster: Cluster) -> None:
    cluster.looks = [{"CPU": 1.0}]
    check_room(Resources(workers=4, min_workers=1))
    await_room(Resources(workers=4, min_workers=1, scale_up_minutes=5), 0, print)
    assert cluster.asked == []
    with pytest.raises(
        ConfigError, match=r"^resources\.min_workers is 2 with 1 CPU .* Lower resources\.min_workers or"
    ):
        check_room(Resources(workers=4, min_workers=2))


def test_a_cluster_that_grows_from_nothing_is_waited_for(cluster: Cluster) -> None:
    cluster.looks = [{}, {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 4.0}]
    heard: list[str] = []
    await_room(Resources(workers=4, cpus_per_worker=2, gpus_per_worker=1, scale_up_minutes=5), 1, heard.append)
    assert cluster.asked == [[{"CPU": 2, "GPU": 1}] * 4]
    waits = [("8 CPU", 0), ("8 CPU", 4), ("4 GPU", 1)]
    assert heard == [f"waiting for {what}; the cluster has {there} now" for what, there in waits]
    await_room(Resources(workers=4, scale_up_minutes=5), 0, heard.append)
    assert len(cluster.asked) == 1  # what is there needs no asking


def test_one_that_does_not_grow_ends_the_command_which_may_be_given_again(cluster: Cluster) -> None:
    cluster.looks = [{"CPU": 8.0}]
    resources = Resources(workers=4, gpus_per_worker=1, scale_up_minutes=1e-9)
    await_room(resources, 0, print)  # work on CPUs waits for no GPU
    with pytest.raises(LostError, match=r"did not grow .*waited for 4 GPU; the cluster has 0 now\. .*ray status"):
        await_room(resources, 1, print)
    assert cluster.asked == [[{"CPU": 1, "GPU": 1}] * 4]


def test_trials_are_as_many_as_fit_or_as_a_cluster_that_grows_is_to_run(cluster: Cluster) -> None:
    cluster.looks = [{"CPU": 2.0}]
    assert [_fitting(Resources(), at_once) for at_once in (None, 1, 5)] == [2, 1, 2]
    assert [_fitting(Resources(scale_up_minutes=1), at_once) for at_once in (None, 1, 5)] == [2, 1, 5]
