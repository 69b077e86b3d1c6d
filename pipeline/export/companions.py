"""What exports share: files that go along with each, and what a format says of a model it does not take."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.models.family import families
from pipeline.package.manifest import CONFIG, WEIGHTS, check

OWN = {WEIGHTS, CONFIG, "README.md"}  # of the package itself


def copy_companions(package: Path, out: Path) -> None:
    """Copy the files that the manifest lists, and no others, as they are."""
    for name in check(package)["files"]:
        if name not in OWN:
            shutil.copyfile(package / name, out / name)


def valid_for(config: PreTrainedConfig, refused: str = "") -> str:
    """Return the formats that take a model's family, for people, without the one that `refused` it."""
    family = families().get(config.model_type)
    names = family.formats if family is not None else ("transformers",)
    return ", ".join(sorted(name for name in names if name != refused))
