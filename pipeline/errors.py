"""What can go wrong, as one readable paragraph each.

Every message says the cause, the offending value, the knob that changes it and the values it takes. Each class
takes one string, so an error survives pickling between a worker and the driver.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BitmillError(Exception):
    """A failure that is explained to the user without a traceback."""


class BeginAgainError(Exception):
    """The workers of a training group are to begin again from the last checkpoint, with what one of them found out."""


class ConfigError(BitmillError):
    """The configuration or the input cannot work; said before any worker starts (exit status 2)."""


class RunError(BitmillError):
    """The run failed; the message says what was kept and what to do (exit status 1)."""


class FencedOffError(RunError):
    """Another process took this step over; whatever this one would still write is refused."""


class DamagedError(RunError):
    """A stored file does not match its checksum."""


class LostError(RunError):
    """A worker died, or a disk or a network failed it; trying again may help."""


class FullDiskError(LostError, OSError):
    """A disk takes no more; an OSError too, by which whoever can do without a write passes over it."""


class UnforeseenError(RunError):
    """Code failed in a way that was not foreseen."""


class NotRegisteredError(RunError):
    """A student failed the gate; its package is kept."""


class OverBudgetError(RunError):
    """As many worker-hours were used as may be; what was committed is kept."""


class UnfitExportError(RunError):
    """An export does not do in its runtime what the package does, and was deleted."""


class BusyError(RunError):
    """Another live process runs this step and the caller did not want to wait."""


_KINDS: list[type[BitmillError]] = [BitmillError, *BitmillError.__subclasses__(), *RunError.__subclasses__()]
_KINDS += LostError.__subclasses__()
ERRORS = {kind.__name__: kind for kind in _KINDS}


@contextlib.contextmanager
def writing_to(path: Path, knob: str) -> Iterator[None]:
    """Turn what libraries raise inside, each in its own way, when the disk below a path takes no more."""
    try:
        yield
    except BitmillError:
        raise
    except Exception as error:
        reason = next((os.strerror(code) for code in FULL_DISK if os.strerror(code) in str(error)), None)
        if reason is None:
            raise
        free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
        raise FullDiskError(
            f"{path} cannot be written: {reason}; {free:,} bytes are free there. Make room (`bitmill gc --plan` tells "
            f"what nobody needs), or set {knob} to a directory on another disk. What was committed is kept; the same "
            "command goes on from there."
        ) from error
