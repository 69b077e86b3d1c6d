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
from pipeline.store import lease
from pipeline.store.lease import DEAD_AFTER_S, Lease, Owner
from pipeline.store.objects import open_objects
from pipeline.store.records import Evaluation
from pipeline.store.step_store import StepDir
from tests.store.test_step_store import EVERYWHERE, KEY, at_once, evaluation, file_of, serve_s3

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


def lease_of(step_dir):
    return Lease.parse(open_objects(step_dir.storage_uri).read(NAME))


def set_lease(step_dir, owner, age_s=0.0, fence=7):
    open_objects(step_dir.storage_uri).write(NAME, Lease(owner, fence, time.time() - age_s).to_json())


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
        old.forget_record,
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
        assert second.read("a") == b"x"


def test_the_lease_is_released_when_the_step_fails(step_dir):
    with pytest.raises(ZeroDivisionError), step_dir.hold(False, never):
        raise ZeroDivisionError
    with step_dir.hold(False, never):
        pass


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
        assert step_dir.read("a") == b"in time"
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
def test_a_live_owner_is_not_taken_over(step_dir, owner, age_s):
    set_lease(step_dir, owner, age_s)
    with pytest.raises(BusyError, match=f"process {owner.pid} on {owner.host.split()[0]}"), step_dir.hold(False, never):
        pass
    assert lease_of(step_dir).owner == owner


@pytest.mark.parametrize(
    ("owner", "age_s"),
    [
        (this_host(os.getpid(), started_ticks(os.getpid()) - 100), 0.0),
        (Owner("elsewhere", os.getpid(), started_ticks(os.getpid())), DEAD_AFTER_S + 1),
        (None, 0.0),
    ],
    ids=["pid used again", "silent elsewhere", "released"],
)
def test_a_dead_owner_is_taken_over(step_dir, tmp_path, owner, age_s):
    set_lease(step_dir, owner, age_s, fence=7)
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
        assert beaten.heartbeat > first.heartbeat
        assert (beaten.owner, beaten.fence) == (first.owner, first.fence)
        mine.write("a", b"x")
    assert lease_of(step_dir).owner is None


def test_a_holder_that_was_taken_over_leaves_the_new_lease_alone(step_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)  # longer than a store takes to swap
    theirs = Lease(Owner("elsewhere", 1, 0.0), 99, time.time())
    objects = open_objects(step_dir.storage_uri)
    with step_dir.hold(False, never) as mine:
        while not objects.swap(NAME, objects.read(NAME), theirs.to_json()):
            pass
        time.sleep(0.5)  # the heart notices
        assert_fenced_off(mine, tmp_path)
    assert lease_of(step_dir) == theirs
