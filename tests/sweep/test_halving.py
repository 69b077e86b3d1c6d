"""Who is stopped at a rung: nobody for a larger model, and without sizes as Ray's own ASHA would."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from pipeline.config.sweep import Asha
from pipeline.sweep.halving import Halving
from pipeline.sweep.queue import TrialQueue
from pipeline.sweep.run import plan_sweep
from pipeline.tracking.outbox import Outbox

GRACE, RUNGS = 5, 3


@st.composite
def sweeps(draw, sizes=(100, 200, 400), teachers=("a", "b"), factors=(2, 3, 4)):
    """A factor, trials (teacher, size, a loss at each rung), and the order in which they come to their next rung."""
    trials = draw(st.lists(st.tuples(st.sampled_from(teachers), st.sampled_from(sizes)), min_size=1, max_size=14))
    losses = iter(draw(st.permutations(range(RUNGS * len(trials)))))
    known = {f"t{i}": (*trial, [float(next(losses)) for _ in range(RUNGS)]) for i, trial in enumerate(trials)}
    return draw(st.sampled_from(factors)), known, draw(st.permutations([key for key in known for _ in range(RUNGS)]))


def stopped(factor, trials, order, left_out=frozenset()):
    """Where each trial that is stopped is: the number of its rung."""
    halving, at, ended = Halving(Asha(grace_steps=GRACE, reduction_factor=factor)), dict.fromkeys(trials, 0), {}
    for key in order:
        if key in left_out or key in ended:
            continue
        teacher, size, losses = trials[key]
        if not halving.goes_on(key, teacher, size, GRACE * factor ** at[key], losses[at[key]]):
            ended[key] = at[key]
        at[key] += 1
    return ended


@given(sweeps())
def test_no_trial_is_stopped_for_a_larger_one_or_one_of_another_teacher(sweep):
    factor, trials, order = sweep
    ended = stopped(factor, trials, order)
    for key, (teacher, size, _) in trials.items():
        others = {other for other, (its, bytes_, _) in trials.items() if its != teacher or bytes_ > size}
        assert stopped(factor, trials, order, others).get(key) == ended.get(key)


@given(sweeps())
def test_the_best_of_the_smallest_size_is_never_stopped(sweep):
    factor, trials, order = sweep
    ended = stopped(factor, trials, order)
    for teacher in {teacher for teacher, _, _ in trials.values()}:
        least = min(size for its, size, _ in trials.values() if its == teacher)
        smallest = {key: losses for key, (its, size, losses) in trials.items() if (its, size) == (teacher, least)}
        best = [min(losses[rung] for losses in smallest.values()) for rung in range(RUNGS)]
        assert not [key for key, rung in ended.items() if key in smallest and smallest[key][rung] == best[rung]]


@given(sweeps())
def test_who_is_stopped_is_beaten_in_both_loss_and_bytes(sweep):
    factor, trials, order = sweep
    for key, rung in stopped(factor, trials, order).items():
        teacher, size, losses = trials[key]
        assert [
            other
            for other, (its, bytes_, theirs) in trials.items()
            if its == teacher and bytes_ <= size and theirs[rung] < losses[rung]
        ]


@given(sweeps(sizes=(0,), teachers=("a",), factors=(2, 4)))  # whose quantiles are exact
def test_without_sizes_it_is_the_halving_of_ray(sweep):
    factor, trials, order = sweep
    ray = ASHAScheduler(
        metric="nats", mode="min", time_attr="step", grace_period=GRACE, reduction_factor=factor, max_t=10**9
    )
    made = {key: SimpleNamespace(trial_id=key) for key in trials}
    for trial in made.values():
        ray.on_trial_add(None, trial)
    at, ended = dict.fromkeys(trials, 0), {}
    for key in order:
        if key not in ended:
            result = {"step": GRACE * factor ** at[key], "nats": trials[key][2][at[key]]}
            if ray.on_trial_result(None, made[key], result) == ASHAScheduler.STOP:
                ended[key] = at[key]
            at[key] += 1
    assert stopped(factor, trials, order) == ended


def test_rungs_are_reached_once():
    halving = Halving(Asha(grace_steps=10, reduction_factor=3))
    assert halving.goes_on("first", "t", 1, 10, 1.0)
    assert halving.goes_on("second", "t", 1, 9, 99.0)  # is not there yet
    assert halving.goes_on("third", "t", 1, 29, 1.0)
    assert halving.goes_on("third", "t", 1, 29, 99.0)  # was there
    assert not halving.goes_on("second", "t", 1, 12, 99.0)
    assert halving.goes_on("fourth", "t", 1, 90, 99.0)  # the first so far


@pytest.mark.parametrize("objectives", [["gap", "bytes"], ["gap"]])
def test_sizes_count_where_bytes_are_an_objective(tiny_config, cloned, objectives):
    settings = {"space": {"quant.bits": ["4-4-8", "2-2-8"]}, "asha": {"grace_steps": 5}, "objectives": objectives}
    config = tiny_config(cloned, resources={"workers": 1}, sweep=settings)
    planned = plan_sweep(config)
    wide, narrow = (trial.key for trial in planned.known)
    with planned.step_dir.hold(True, print) as step_dir, Outbox(cloned / "outbox") as outbox:
        queue = TrialQueue(config, config.sweep, planned.key, step_dir, planned.known, outbox, lambda *said: None)
        assert [queue.next()[0] for _ in range(2)] == [wide, narrow]
        assert queue.goes_on(wide, 5, 1.0)
        assert queue.goes_on(narrow, 5, 2.0) == ("bytes" in objectives)
        assert queue.goes_on(narrow, 15, 1.0)
        assert not queue.goes_on(wide, 15, 2.0)


def test_without_asha_all_go_on(tiny_config, cloned):
    config = tiny_config(cloned, sweep={"space": {"quant.bits": ["2-2-8"]}})
    planned = plan_sweep(config)
    with planned.step_dir.hold(True, print) as step_dir, Outbox(cloned / "outbox") as outbox:
        queue = TrialQueue(config, config.sweep, planned.key, step_dir, planned.known, outbox, lambda *said: None)
        key, _ = queue.next()
        assert [queue.goes_on(key, step, 9.0) for step in (5, 500)] == [True, True]
