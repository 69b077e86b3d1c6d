"""A memo of what local files hold, and the folder where an installed package keeps its files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.store.objects import Directory
from pipeline.store.step_store import checksum


class ContentMemo:
    """A memo of facts about local files, by path, inode, size and mtime, so that unchanged is answered at once."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "content.json"
        try:
            self._known: dict[str, str] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file."""
        return self.remembered(path, "", lambda: checksum(path).sha256)

    def remembered(self, path: Path, what: str, find_out: Callable[[], str]) -> str:
        """Return what `find_out` says of a file, or said before of the same file under the name `what`."""
        status = path.stat()
        name = f"{path.resolve()}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}{what and '|'}{what}"
        if name not in self._known:
            self._known[name] = find_out()
            Directory(self._path.parent).write(self._path.name, json.dumps(self._known).encode())
        return self._known[name]


def package_folder(module: str, package: str | None) -> Path:
    """Return the folder of a module. Raises ConfigError if its package is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The Python package {package} is not installed; run: pip install {package}")
    return Path(spec.origin).parent
