"""What of a package goes along with every export: the tokenizer and the generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.package.manifest import CONFIG, WEIGHTS, check

OWN = {WEIGHTS, CONFIG, "README.md"}  # of the package itself


def copy_companions(package: Path, out: Path) -> None:
    """Files that the manifest lists, and no others, as they are."""
    for name in check(package)["files"]:
        if name not in OWN:
            shutil.copyfile(package / name, out / name)
