"""Signals by which this process is asked to end, held back until its work can."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

from pipeline.store.records import Advance, Point


class Signals:
    """Ctrl-C and SIGTERM, held back while inside, as a context, until the work knows and has then reported. A second
    one is not held back."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._number, self._known = advance, 0, False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python tells no other
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold_back)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._restore()
        if kind is None:
            self._let_go()

    def came(self) -> bool:
        """Tell whether one came: the work knows now."""
        self._known = self._number > 0
        return self._known

    def report(self, done: int, total: int, note: str, points: Sequence[Point] = ()) -> None:
        """Pass progress on, and then let go of what the work knows of."""
        self._advance(done, total, note, points)
        if self._known:
            self._let_go()

    def _hold_back(self, number: int, frame: Any) -> None:
        self._number = number
        self._restore()

    def _let_go(self) -> None:
        number, self._number, self._known = self._number, 0, False
        if number:
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
