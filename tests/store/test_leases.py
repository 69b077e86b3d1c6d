"""Who may write a step: leases, takeovers and fences, on a directory and on S3."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import BusyError, FencedOffError
from pipeline.store import lease
from pipeline.store.lease import DEAD_AFTER_S, Lease, Owner
from pipeline.store.objects import open_objects
from pipeline.store.records import Evaluation
from pipeline.store.step_store import StepDir
from tests.store.test_step_store import EVERYWHERE, KEY, at_once, content, evaluation, file_of, refuse, serve_s3

NAME = f"{Evaluation.stage}/{KEY}/lease.json"
DRIVER = """
import sys
from pipeline.store.step_store import StepDir
with StepDir(*sys.argv[1:]).hold(False, print) as step_dir:
    print(step_dir.fence, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=EVERYWHERE)
def step_dir(request, tmp_path):
    """A step's directory that nobody holds."""
    uri = str(tmp_path / "store") if request.param == "directory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    return StepDir(uri, Evaluation.stage, KEY, str(tmp_path / "scratch"))


@pytest.fixture
def child():
    """A process that waits until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def started_ticks(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])


def this_host(pid, started):
    return Owner(lease._this_host(), pid, started)


PID_USED_AGAIN = this_host(os.getpid(), started_ticks(os.getpid()) - 100)
ELSEWHERE = Owner("elsewhere", os.getpid(), started_ticks(os.getpid()))


def lease_of(step_dir):
    return Lease.parse(open_objects(step_dir.storage_uri).read(NAME))


def set_lease(step_dir, owner, fence=7):
    open_objects(step_dir.storage_uri).write(NAME, Lease(owner, fence).to_json())


def never(owner):
    raise AssertionError(f"waited for {owner}")


def assert_fenced_off(old, tmp_path):
    """Nothing that an attempt which lost its lease still tries to write gets through."""
    before = {name: old.read(name) for name in old.sizes()}
    path = file_of(tmp_path, b"late")
    for late in (
        lambda: old.write("a", b"late"),
        lambda: old.upload("a", path),
        lambda: old.delete("a"),
        lambda: old.commit(evaluation("late")),
        old.check_fence,
    ):
        with pytest.raises(FencedOffError, match="no longer ours"):
            late()
    assert {name: old.read(name) for name in old.sizes()} == before


def test_a_holder_writes_and_leaves_the_step_to_the_next(step_dir):
    with step_dir.hold(False, never) as first:
        assert lease_of(step_dir).owner == Owner.this_process()
        first.write("a", b"x")
    assert lease_of(step_dir).owner is None
    with step_dir.hold(False, never) as second:
        assert second.fence > first.fence
        assert content(second, "a") == b"x"


def test_who_seizes_the_lease_waits_for_no_live_owner_which_writes_nothing_more(step_dir, tmp_path):
    with step_dir.hold(wait=False, waiting=never) as old:
        with step_dir._lease.hold(wait=False, waiting=never, seize=True) as fence:
            assert fence == old.fence + 1
            assert_fenced_off(old, tmp_path)
        assert lease_of(step_dir).owner is None
    assert lease_of(step_dir).fence == fence  # the old one let go of nothing


def test_the_lease_is_released_when_the_step_fails(step_dir):
    with pytest.raises(ZeroDivisionError), step_dir.hold(False, never):
        raise ZeroDivisionError
    with step_dir.hold(False, never):
        pass


@pytest.mark.parametrize("under_way", [ZeroDivisionError, None])
def test_a_store_that_is_away_when_the_lease_is_let_go_hides_no_other_error(step_dir, monkeypatch, under_way):
    def away(self, name):
        raise OSError("the store is away")

    def work():
        with step_dir.hold(False, never):
            monkeypatch.setattr(type(open_objects(step_dir.storage_uri)), "read", away)
            if under_way is not None:
                raise under_way

    with pytest.raises(under_way or OSError) as raised:
        work()
    assert ("away" in str(raised.value)) == (under_way is None)


def test_nobody_writes_without_having_held_the_lease(step_dir, tmp_path):
    assert_fenced_off(replace(step_dir, fence=1), tmp_path)


def test_a_killed_driver_is_named_waited_for_and_fenced_off(step_dir, tmp_path):
    arguments = [step_dir.storage_uri, step_dir.stage, step_dir.key, step_dir.scratch]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    told = []

    def waiting(owner):
        told.append(owner)
        driver.kill()
        driver.wait()

    try:
        worker = replace(step_dir, fence=int(driver.stdout.readline()))
        worker.write("a", b"in time")
        with (
            pytest.raises(BusyError, match=rf"process {driver.pid} on {socket.gethostname()}"),
            step_dir.hold(False, never),
        ):
            pass
        with step_dir.hold(True, waiting) as taken:
            assert [owner.pid for owner in told] == [driver.pid]
            assert taken.fence > worker.fence
            assert_fenced_off(worker, tmp_path)
            assert taken.commit(evaluation("ours")) == evaluation("ours")
        assert_fenced_off(worker, tmp_path)
        assert step_dir.record(Evaluation) == evaluation("ours")
        assert content(step_dir, "a") == b"in time"
    finally:
        driver.kill()
        driver.communicate()


def test_a_live_process_is_waited_for_until_it_is_done(step_dir):
    held, release = threading.Event(), threading.Event()
    told = []

    def first():
        with step_dir.hold(False, never) as mine:
            held.set()
            assert release.wait(30)
            mine.write("a", b"first")

    def waiting(owner):
        told.append(owner)
        release.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(30)
    with step_dir.hold(True, waiting) as second:
        assert content(second, "a") == b"first"
    thread.join()
    assert told == [Owner.this_process()]


@pytest.mark.parametrize("owner", ["alive here", ELSEWHERE], ids=["alive here", "who knows, elsewhere"])
def test_whoever_does_not_wait_takes_over_from_nobody_who_may_live(step_dir, child, owner):
    owner = this_host(child.pid, started_ticks(child.pid)) if owner == "alive here" else owner
    set_lease(step_dir, owner)
    needle = f"process {owner.pid} on {owner.host.split()[0]}.*--no-wait.*silent for 60 s"
    with pytest.raises(BusyError, match=needle), step_dir.hold(False, never):
        pass
    assert lease_of(step_dir).owner == owner


class Clock:
    """The lease's own clock from here on: it stands still but for its sleeps, and `meanwhile` happens in each."""

    def __init__(self, monkeypatch, meanwhile=lambda: None):
        self.now, self.slept, self.meanwhile = 1000.0, 0, meanwhile
        monkeypatch.setattr(lease, "time", self)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += 1
        self.meanwhile()

    def time(self):
        raise AssertionError("no other machine knows what time it is here")


def test_an_owner_elsewhere_is_taken_over_once_its_heart_was_seen_to_stand_still(step_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", DEAD_AFTER_S / 12)
    clock, told = Clock(monkeypatch), []
    set_lease(step_dir, ELSEWHERE, fence=7)
    with step_dir.hold(True, told.append) as taken:
        assert (taken.fence, told) == (8, [ELSEWHERE])
        assert clock.slept == 12
        assert_fenced_off(replace(step_dir, fence=7), tmp_path)


def test_an_owner_here_is_asked_and_its_heart_may_stand_still(step_dir, child, monkeypatch):
    def meanwhile():
        if clock.slept == 30:
            set_lease(step_dir, None)

    monkeypatch.setattr(lease, "POLL_S", DEAD_AFTER_S / 3)
    clock = Clock(monkeypatch, meanwhile)
    set_lease(step_dir, this_host(child.pid, started_ticks(child.pid)))
    with step_dir.hold(True, lambda owner: None):
        assert clock.slept == 30


@pytest.mark.parametrize("call", ["create", "swap"])
def test_a_lease_that_this_process_has_and_does_not_know_of_is_taken_over(step_dir, monkeypatch, call):
    objects = type(open_objects(step_dir.storage_uri))
    sound = getattr(objects, call)

    def answer_lost(self, *arguments):
        sound(self, *arguments)
        raise OSError("the store is away")

    if call == "swap":
        set_lease(step_dir, None, fence=0)
    with monkeypatch.context() as away:  # when it was taken
        away.setattr(objects, call, answer_lost)
        with pytest.raises(OSError, match="away"), step_dir.hold(False, never):
            pass
    with (
        monkeypatch.context() as away,
        pytest.raises(OSError, match="not supported"),  # when it was let go
        step_dir.hold(False, never) as second,
    ):
        away.setattr(objects, "swap", refuse)
    assert lease_of(step_dir).owner == Owner.this_process()
    with step_dir.hold(False, never) as third:
        assert (second.fence, third.fence) == (2, 3)


@pytest.mark.parametrize("skew_s", [-61.0, 0.0, 3600.0])
def test_a_live_owner_is_waited_for_whatever_its_clock_says(step_dir, monkeypatch, skew_s):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    held, release = threading.Event(), threading.Event()
    mine, real = threading.current_thread(), time.time

    def another_machine():
        with step_dir.hold(False, never) as owner:
            held.set()
            assert release.wait(60)
            owner.write("a", b"by the owner")

    def beats():
        """Four beats a minute of the watcher's clock."""
        clock.now += 15
        before, end = lease_of(step_dir), time.monotonic() + 30
        while lease_of(step_dir) == before and time.monotonic() < end:
            time.sleep(0.005)
        if clock.slept == 9:
            release.set()
            thread.join()

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Owner, "this_process", classmethod(lambda cls: ELSEWHERE))
        thread = threading.Thread(target=another_machine)
        thread.start()
        assert held.wait(30)
    clock = Clock(monkeypatch, beats)
    clock.time = lambda: real() + (0.0 if threading.current_thread() is mine else skew_s)
    try:
        with step_dir.hold(True, lambda owner: None) as taken:
            assert (clock.slept, content(taken, "a")) == (9, b"by the owner")
    finally:
        release.set()
        thread.join()


@pytest.mark.parametrize("owner", [PID_USED_AGAIN, None], ids=["pid used again", "released"])
def test_a_dead_owner_is_taken_over(step_dir, tmp_path, owner):
    set_lease(step_dir, owner, fence=7)
    with step_dir.hold(False, never) as taken:
        assert taken.fence == 8
        assert lease_of(step_dir).owner == Owner.this_process()
        assert_fenced_off(replace(step_dir, fence=7), tmp_path)


def test_a_killed_process_is_gone_at_once(step_dir, child):
    owner = this_host(child.pid, started_ticks(child.pid))
    assert not owner.gone()
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked yet
    assert owner.gone()
    child.wait()
    assert owner.gone()
    set_lease(step_dir, owner)
    with step_dir.hold(False, never) as taken:
        assert taken.fence == 8


def test_of_many_that_take_over_one_gets_the_step(step_dir):
    set_lease(step_dir, this_host(os.getpid(), 0), fence=7)
    tried = threading.Barrier(8)

    def attempt(_):
        try:
            with step_dir.hold(False, never) as mine:
                tried.wait(30)
                return mine.fence
        except BusyError:
            tried.wait(30)
            return None

    assert sorted(at_once(attempt), key=str) == [8, *[None] * 7]


def test_the_heart_beats_while_the_step_is_held(step_dir, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    with step_dir.hold(False, never) as mine:
        first = lease_of(step_dir)
        deadline = time.monotonic() + 30
        while lease_of(step_dir).heartbeat == first.heartbeat and time.monotonic() < deadline:
            time.sleep(0.005)
        beaten = lease_of(step_dir)
        assert beaten.heartbeat != first.heartbeat
        assert (beaten.owner, beaten.fence) == (first.owner, first.fence)
        mine.write("a", b"x")
    assert lease_of(step_dir).owner is None


def test_the_heart_beats_until_all_is_cleared_away(step_dir, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    objects, beaten = open_objects(step_dir.storage_uri), []

    def slow(self, prefix, given_up):
        before, end = lease_of(step_dir), time.monotonic() + 3
        while lease_of(step_dir) == before and time.monotonic() < end:
            time.sleep(0.005)
        beaten.append(lease_of(step_dir) != before)
        raise OSError("not every role may list uploads")

    monkeypatch.setattr(type(objects), "delete_unfinished", slow)
    with step_dir.hold(False, never):
        pass
    assert beaten == [True]
    assert lease_of(step_dir).owner is None


def test_where_the_lease_is_lost_no_token_is_given_again(step_dir):
    for number in range(11):
        with step_dir.hold(False, never) as attempt:
            if number in (1, 10):
                attempt.write("a", b"of attempt %d" % attempt.fence)
    open_objects(step_dir.storage_uri).delete(NAME)
    with step_dir.hold(False, never) as attempt:
        assert attempt.fence == 12
        assert content(attempt, "a") == b"of attempt 11"


def test_what_the_store_is_asked_does_not_grow_with_the_attempts_before(step_dir, monkeypatch):
    objects, asked = open_objects(step_dir.storage_uri), Counter()

    def counting(name):
        sound = getattr(type(objects), name)

        def call(self, *arguments):
            asked[name] += 1
            return sound(self, *arguments)

        monkeypatch.setattr(type(objects), name, call)

    for name in ("read", "write", "create", "swap", "sizes", "folders", "delete", "delete_below", "delete_unfinished"):
        counting(name)
    counts = []
    for fence in (1, 30):
        set_lease(step_dir, None, fence)
        asked.clear()
        with step_dir.hold(False, never) as attempt:
            stored = attempt.write("weights", b"w")
            attempt.newest("weights")
            attempt.commit(evaluation("d", weights=stored))
        counts.append(dict(asked))
        objects.delete_below(f"{Evaluation.stage}/{KEY}/")
    assert counts[0] == counts[1]


def test_a_holder_that_was_taken_over_leaves_the_new_lease_alone(step_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)  # longer than a store takes to swap
    theirs = Lease(ELSEWHERE, 99)
    objects = open_objects(step_dir.storage_uri)
    with step_dir.hold(False, never) as mine:
        while not objects.swap(NAME, objects.read(NAME), theirs.to_json()):
            pass
        time.sleep(0.5)  # the heart notices
        assert_fenced_off(mine, tmp_path)
    assert lease_of(step_dir) == theirs
