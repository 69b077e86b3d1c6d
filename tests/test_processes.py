"""An interrupted suite ends what it started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import psutil

from jobs.bench.chaos.processes import start

FORK = multiprocessing.get_context("fork")
DEADLINE_S = 60


def begin_and_be_killed(pipe):
    pipe.send(start(["sleep", "600"]).pid)
    os.kill(os.getpid(), signal.SIGKILL)


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_command_ends_with_the_test_that_started_it():
    theirs, ours = FORK.Pipe()
    process = FORK.Process(target=begin_and_be_killed, args=(ours,))
    process.start()
    pid = theirs.recv()
    process.join()
    end = time.monotonic() + DEADLINE_S
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not runs(pid)
