"""When and on what something ran, and what code it was: what records keep and no key holds."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "ray", "pyarrow", "mlflow")
CODE_FILE = "bitmill.json"  # beside code that was sent, where neither a package's metadata nor git tell what it is
UNKNOWN = "unknown"
ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str]:
    """Return when and on what something ran, and versions of code and libraries; informative, never part of a key."""
    when = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine()}
    return when | code_version() | {library: _version(library) or UNKNOWN for library in LIBRARIES}


def code_version() -> dict[str, str]:
    """Return the version of the product and the commit of its code, each as its installation or checkout says, else as
    the file that was sent with the code; it can be "unknown"."""
    try:
        sent = json.loads((ROOT / CODE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sent = {}
    told = {"bitmill": _version("bitmill"), "commit": _commit()}
    return {name: value or sent.get(name, UNKNOWN) for name, value in told.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checked-out commit if the code runs from a checkout."""
    command = ["git", f"--git-dir={ROOT / '.git'}", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return None
