"""What a local file is, remembered; and where an installed package keeps its files."""

from __future__ import annotations

import importlib.util
import json
import uuid
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.store.step_store import checksum


class ContentMemo:
    """SHA-256 of local files, remembered by path, inode, size and mtime, so that unchanged is answered at once."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "content.json"
        try:
            self._known: dict[str, str] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        status = path.stat()
        name = f"{path.resolve()}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = checksum(path).sha256
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self._path)
        return self._known[name]


def package_folder(module: str, package: str | None) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The Python package {package} is not installed; run: pip install {package}")
    return Path(spec.origin).parent
