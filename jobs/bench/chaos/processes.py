"""Commands that do not outlive who starts them, however that ends."""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """Start a command that hears interrupts, as one at a terminal does, and is ended if this process goes before it."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background has it ignored, and passes that on
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(command, preexec_fn=prepare, **settings)
