"""A command that is interrupted clears up behind itself and says so, whoever interrupts it."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.commands.options import interruptible
from pipeline.export import dequantized

SPAWN = multiprocessing.get_context("spawn")  # the signal is for a process of its own, with handlers of its own
SAID = "interrupted; what was committed is kept, and the same command goes on from there"


def export_interrupted(by, package, out, pipe):
    signal.signal(by, signal.default_int_handler if by == signal.SIGINT else signal.SIG_DFL)  # as at a terminal
    dequantized.write = lambda package, draft: os.kill(os.getpid(), by)
    shown = CliRunner().invoke(app, ["export", str(package), "--format", "transformers", "--out", str(out)])
    pipe.send((shown.exit_code, shown.stderr))


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_leaves_nothing(finished, tmp_path, by):
    theirs, ours = SPAWN.Pipe()
    process = SPAWN.Process(target=export_interrupted, args=(by, finished.package, tmp_path / "out", ours))
    process.start()
    ours.close()
    process.join()
    assert process.exitcode == 0
    status, said = theirs.recv()
    assert (status, said.splitlines()[-1]) == (1, SAID)
    assert list(tmp_path.iterdir()) == []


def test_what_ray_makes_of_a_signal_is_an_interruption_too(monkeypatch, tmp_path):
    def terminated(*_):
        raise SystemExit(signal.SIGTERM)

    monkeypatch.setattr("pipeline.config.load.load_config", terminated)
    shown = CliRunner().invoke(app, ["compress", str(tmp_path / "any.yaml")])
    assert (shown.exit_code, shown.stderr.strip()) == (1, SAID)


def test_a_terminal_that_was_told_to_close_alone_closes_alone():
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
