"""A signal waits for work that knows of it; the second one does not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from pipeline.execution.signals import Signals


@pytest.fixture(autouse=True)
def _raising() -> Iterator[None]:
    """SIGTERM interrupts, as it does in a command."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(work: Callable[[Signals], None]) -> list[int]:
    """Do work that a signal interrupts; the progress it told before."""
    told: list[int] = []

    def inside() -> None:
        with Signals(lambda done, total, note, points=(): told.append(done)) as signals:
            work(signals)

    with pytest.raises(KeyboardInterrupt):
        inside()
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    return told


def test_it_is_let_go_once_the_work_knows_and_has_reported() -> None:
    def work(signals: Signals) -> None:
        assert not signals.came()
        end()
        signals.report(1, 9, "")  # the work has not looked yet
        assert signals.came()
        signals.report(2, 9, "")
        signals.report(3, 9, "")

    assert interrupted(work) == [1, 2]


def test_work_that_never_looks_is_interrupted_where_it_ends() -> None:
    def work(signals: Signals) -> None:
        end()
        signals.report(1, 9, "")

    assert interrupted(work) == [1]


def test_the_second_is_not_held_back() -> None:
    def work(signals: Signals) -> None:
        end()
        signals.report(1, 9, "")
        os.kill(os.getpid(), signal.SIGINT)
        signals.report(2, 9, "")

    assert interrupted(work) == [1]


def test_what_fails_meanwhile_is_told() -> None:
    def work() -> None:
        with Signals(lambda *_, points=(): None):
            end()
            raise OSError("a disk")

    with pytest.raises(OSError, match="a disk"):
        work()


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals(lambda *_, points=(): None):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_which_python_tells_nothing_hold_nothing_back() -> None:
    handlers: list[object] = []

    def work() -> None:
        with Signals(lambda *_, points=(): None):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
