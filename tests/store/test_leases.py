"""Who may write a step: leases, takeovers and fences, on a directory and on S3."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import BusyError, FencedOffError
from pipeline.store import step_store
from pipeline.store.lease import DEAD_AFTER_S, Lease, Owner
from pipeline.store.objects import open_objects
from pipeline.store.records import Report
from pipeline.store.step_store import StepDir
from tests.store.test_step_store import EVERYWHERE, KEY, at_once, file_of, report, serve_s3

NAME = f"{Report.stage}/{KEY}/lease.json"
DRIVER = """
import sys
from pipeline.store.step_store import Place
with Place(*sys.argv[1:]).hold(False, print) as place:
    print(place.fence, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as uri:
        yield uri


@pytest.fixture(params=EVERYWHERE)
def place(request, tmp_path):
    """A step's place that nobody holds."""
    uri = str(tmp_path / "store") if request.param == "directory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4()}"
    return StepDir(uri, Report.stage, KEY, str(tmp_path / "scratch"))


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
    return Owner(step_store._this_host(), pid, started)


def lease_of(place):
    return Lease.parse(open_objects(place.storage_uri).read(NAME))


def set_lease(place, owner, age_s=0.0, fence=7):
    open_objects(place.storage_uri).write(NAME, Lease(owner, fence, time.time() - age_s).to_json())


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
        lambda: old.commit(report("late")),
        old.forget_record,
        old.check_fence,
    ):
        with pytest.raises(FencedOffError, match="no longer ours"):
            late()
    assert {name: old.read(name) for name in old.sizes()} == before


def test_a_holder_writes_and_leaves_the_step_to_the_next(place):
    with place.hold(False, never) as first:
        assert lease_of(place).owner == Owner.this_process()
        first.write("a", b"x")
    assert lease_of(place).owner is None
    with place.hold(False, never) as second:
        assert second.fence > first.fence
        assert second.read("a") == b"x"


def test_the_lease_is_released_when_the_step_fails(place):
    with pytest.raises(ZeroDivisionError), place.hold(False, never):
        raise ZeroDivisionError
    with place.hold(False, never):
        pass


def test_nobody_writes_without_having_held_the_lease(place, tmp_path):
    assert_fenced_off(replace(place, fence=1), tmp_path)


def test_a_killed_driver_is_named_waited_for_and_fenced_off(place, tmp_path):
    arguments = [place.storage_uri, place.stage, place.key, place.scratch]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    told = []

    def waiting(owner):
        told.append(owner)
        driver.kill()
        driver.wait()

    try:
        worker = replace(place, fence=int(driver.stdout.readline()))
        worker.write("a", b"in time")
        with (
            pytest.raises(BusyError, match=rf"process {driver.pid} on {socket.gethostname()}"),
            place.hold(False, never),
        ):
            pass
        with place.hold(True, waiting) as taken:
            assert [owner.pid for owner in told] == [driver.pid]
            assert taken.fence > worker.fence
            assert_fenced_off(worker, tmp_path)
            assert taken.commit(report("ours")) == report("ours")
        assert_fenced_off(worker, tmp_path)
        assert place.record(Report) == report("ours")
        assert place.read("a") == b"in time"
    finally:
        driver.kill()
        driver.communicate()


def test_a_live_process_is_waited_for_until_it_is_done(place):
    held, release = threading.Event(), threading.Event()
    told = []

    def first():
        with place.hold(False, never) as mine:
            held.set()
            assert release.wait(30)
            mine.write("a", b"first")

    def waiting(owner):
        told.append(owner)
        release.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(30)
    with place.hold(True, waiting) as second:
        assert second.read("a") == b"first"
    thread.join()
    assert told == [Owner.this_process()]


@pytest.mark.parametrize(
    ("owner", "age_s"),
    [
        (this_host(os.getpid(), started_ticks(os.getpid())), 0.0),
        (this_host(os.getpid(), started_ticks(os.getpid())), 10 * DEAD_AFTER_S),
        (Owner("elsewhere", 1, 0.0), DEAD_AFTER_S - 20),
    ],
    ids=["alive here", "alive here, heart stopped", "alive elsewhere"],
)
def test_a_live_owner_is_not_taken_over(place, owner, age_s):
    set_lease(place, owner, age_s)
    with pytest.raises(BusyError, match=f"process {owner.pid} on {owner.host.split()[0]}"), place.hold(False, never):
        pass
    assert lease_of(place).owner == owner


@pytest.mark.parametrize(
    ("owner", "age_s"),
    [
        (this_host(os.getpid(), started_ticks(os.getpid()) - 100), 0.0),
        (Owner("elsewhere", os.getpid(), started_ticks(os.getpid())), DEAD_AFTER_S + 1),
        (None, 0.0),
    ],
    ids=["pid used again", "silent elsewhere", "released"],
)
def test_a_dead_owner_is_taken_over(place, tmp_path, owner, age_s):
    set_lease(place, owner, age_s, fence=7)
    with place.hold(False, never) as taken:
        assert taken.fence == 8
        assert lease_of(place).owner == Owner.this_process()
        assert_fenced_off(replace(place, fence=7), tmp_path)


def test_a_killed_process_is_gone_at_once(place, child):
    owner = this_host(child.pid, started_ticks(child.pid))
    assert not owner.gone()
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked yet
    assert owner.gone()
    child.wait()
    assert owner.gone()
    set_lease(place, owner)
    with place.hold(False, never) as taken:
        assert taken.fence == 8


def test_of_many_that_take_over_one_gets_the_step(place):
    set_lease(place, this_host(os.getpid(), 0), fence=7)
    tried = threading.Barrier(8)

    def attempt(_):
        try:
            with place.hold(False, never) as mine:
                tried.wait(30)
                return mine.fence
        except BusyError:
            tried.wait(30)
            return None

    assert sorted(at_once(attempt), key=str) == [8, *[None] * 7]


def test_the_heart_beats_while_the_step_is_held(place, monkeypatch):
    monkeypatch.setattr(step_store, "HEARTBEAT_S", 0.01)
    with place.hold(False, never) as mine:
        first = lease_of(place)
        deadline = time.monotonic() + 30
        while lease_of(place).heartbeat == first.heartbeat and time.monotonic() < deadline:
            time.sleep(0.005)
        beaten = lease_of(place)
        assert beaten.heartbeat > first.heartbeat
        assert (beaten.owner, beaten.fence) == (first.owner, first.fence)
        mine.write("a", b"x")
    assert lease_of(place).owner is None


def test_a_holder_that_was_taken_over_leaves_the_new_lease_alone(place, tmp_path, monkeypatch):
    monkeypatch.setattr(step_store, "HEARTBEAT_S", 0.2)  # longer than a store takes to swap
    theirs = Lease(Owner("elsewhere", 1, 0.0), 99, time.time())
    objects = open_objects(place.storage_uri)
    with place.hold(False, never) as mine:
        while not objects.swap(NAME, objects.read(NAME), theirs.to_json()):
            pass
        time.sleep(0.5)  # the heart notices
        assert_fenced_off(mine, tmp_path)
    assert lease_of(place) == theirs
