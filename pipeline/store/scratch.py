"""What commands left in the scratch folder of this machine and nobody has used for long. Times are of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from pipeline.store.copies import COPIES, IN_USE_S, UNFINISHED

# Never all there is: the folder may be one that others use, and the outbox holds what MLflow is yet to be told.
LEFT = ("tmp*", "generating-*", "generated-*.jsonl", "bench-inference/*", f"{COPIES}/*", f"{COPIES}/{UNFINISHED}/*")


def unused(scratch: Path, since_s: float) -> dict[Path, int]:
    """Return the bytes of temporary folders, copies and generated text, by path, in which nothing was read or written
    for so many seconds."""
    paths = [path for pattern in LEFT for path in scratch.glob(pattern) if path != scratch / COPIES / UNFINISHED]
    stats = {path: _stat(path) for path in paths}
    before = time.time() - max(since_s, IN_USE_S)
    return {path: size for path, (used, size) in stats.items() if used <= before}


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; one that is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _stat(path: Path) -> tuple[float, int]:
    """Return when something in a file or folder was read or written last, and its bytes."""
    used, size = 0.0, 0
    for file in (path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)):
        with contextlib.suppress(FileNotFoundError):
            status = file.lstat()
            used = max(used, status.st_mtime if file.is_dir() else max(status.st_atime, status.st_mtime))
            size += 0 if file.is_dir() else status.st_size
    return used, size
