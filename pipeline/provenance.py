"""When and on what something ran, and what code it was: what records keep and no key holds."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "ray", "pyarrow", "mlflow")
CODE_FILE = "bitmill.json"  # beside code that was sent, and there alone
UNKNOWN = "unknown"
ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str]:
    """Return when and on what something ran, and versions of code and libraries; informative, never part of a key."""
    when = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine()}
    return when | code_version() | {library: _version(library) or UNKNOWN for library in LIBRARIES}


def code_version() -> dict[str, str]:
    """Return the version of the product and the commit of its code, as the file beside code that was sent says, else as
    its installation and its checkout do; "unknown" where none does."""
    try:
        sent = json.loads((ROOT / CODE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sent = {}
    version = sent.get("bitmill") or _version("bitmill")
    return {"bitmill": version or UNKNOWN, "commit": sent.get("commit") or _commit() or UNKNOWN}


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
