"""A disk that is full, said as what it is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import BitmillError, FullDiskError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing_to(path: Path, knob: str) -> Iterator[None]:
    """Turn what libraries raise inside, each in its own way, when the disk below a path takes no more."""
    try:
        yield
    except BitmillError:
        raise
    except Exception as error:
        reason = next((os.strerror(code) for code in FULL if os.strerror(code) in str(error)), None)
        if reason is None:
            raise
        free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
        raise FullDiskError(
            f"{path} cannot be written: {reason}; {free:,} bytes are free there. Make room (`bitmill gc --plan` tells "
            f"what nobody needs), or set {knob} to a directory on another disk. What was committed is kept; the same "
            "command goes on from there."
        ) from error
