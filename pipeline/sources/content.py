"""A memo of what local files hold, and the folder where an installed package keeps its files."""

from __future__ import annotations

import contextlib
import importlib.util
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.store.step_store import checksum

LOCK_S = 60.0  # for how long a write waits for those of other processes


class ContentMemo:
    """A memo of facts about local files, by path, inode, size and mtime, so that unchanged is answered at once.

    One SQLite file that any number of processes and threads share. A memo that is damaged, or of another form, is
    thrown away, and one that cannot be written to remembers nothing.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "content.db"
        self._opened: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file."""
        return self.remembered(path, "", lambda: checksum(path).sha256)

    def remembered(self, path: Path, what: str, find_out: Callable[[], str]) -> str:
        """Return what `find_out` says of a file, or said before of the same file under the name `what`."""
        status = path.stat()
        name = f"{path.resolve()}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}{what and '|'}{what}"
        return self.known(name, find_out)

    def known(self, name: str, find_out: Callable[[], str]) -> str:
        """Return what `find_out` says, or said before under a name, which holds all that the answer depends on."""
        known = self._execute("SELECT fact FROM facts WHERE name = ?", name)
        if known:
            return known[0][0]
        fact = find_out()
        self._execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", name, fact)
        return fact

    def _execute(self, statement: str, *values: str) -> list[tuple[str]]:
        """Return the rows that a statement gives; none where the memo cannot be used."""
        with self._lock:
            for _ in range(2):
                try:
                    return self._connection.execute(statement, values).fetchall()
                except (OSError, sqlite3.OperationalError, sqlite3.ProgrammingError):
                    return []  # a full disk, no such folder, a lock that is held for a minute: no damage
                except sqlite3.DatabaseError:
                    self._throw_away()
        return []

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = sqlite3.connect(self._path, timeout=LOCK_S, isolation_level=None, check_same_thread=False)
            # Nothing waits for the disk: a row never changes, so none that a power cut leaves is false.
            self._opened.execute("PRAGMA synchronous = OFF")
            self._opened.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, fact TEXT) WITHOUT ROWID")
            if [row[1] for row in self._opened.execute("PRAGMA table_info(facts)")] != ["name", "fact"]:
                raise sqlite3.DatabaseError("a table of another form")
        return self._opened

    def _throw_away(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        for name in (self._path.name, f"{self._path.name}-journal"):
            with contextlib.suppress(OSError):
                self._path.with_name(name).unlink()


def package_folder(module: str, package: str | None) -> Path:
    """Return the folder of a module. Raises ConfigError if its package is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The Python package {package} is not installed; run: pip install {package}")
    return Path(spec.origin).parent
