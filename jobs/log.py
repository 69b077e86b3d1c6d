"""Lines that a machine reads on stderr with `--log-format json`: one object each, of a run and mostly of a stage."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console

TEXT, JSON = "text", "json"
LOG_FORMATS = (TEXT, JSON)
# What every line has, null where there is none; `key` is the first characters of the step's, as gauges have it.
FIELDS = ("time", "run", "stage", "key", "event", "step", "loss", "message")


class JsonLines:
    """A file of text whose lines become objects. `run` is the name of the configuration, once it is known.

    A line that is such an object already, as those of a job on a cluster may be, stays as it is.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._rest = file, ""
        self.run: str | None = None

    def write(self, text: str) -> int:
        """Write each whole line of what a console prints as an event of its own."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            if _is_written(line):
                self._file.write(f"{line}\n")
            else:
                self.tell("message", message=line.rstrip())
        return len(text)

    def tell(self, event: str, **facts: Any) -> None:
        """Write an event of the run."""
        known = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "run": self.run, "event": event, **facts}
        line = {name: known.pop(name, None) for name in FIELDS} | known
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Flush what lies below."""
        self._file.flush()

    def isatty(self) -> bool:
        """Tell that nobody looks: there are no bars and no colours."""
        return False


def lines_of(console: Console) -> JsonLines | None:
    """Return what turns a console's lines into objects, or None where it writes text."""
    return console.file if isinstance(console.file, JsonLines) else None  # type: ignore[unreachable]


def _is_written(line: str) -> bool:
    try:
        document = json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:
        return False
    return isinstance(document, dict) and set(FIELDS) <= set(document)
