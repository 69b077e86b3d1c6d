"""Files that hold a pickle, told by their content."""

import pickletools
import zipfile
from pathlib import Path


def pickles_below(folder: Path) -> list[Path]:
    """Pickles, and archives of torch.save, which are pickles and tensors."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_pickle(path)]


def _is_pickle(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    content = path.read_bytes()
    if content[:1] != b"\x80":  # as every pickle begins since Python 2.3
        return False
    try:
        return [code.name for code, _, _ in pickletools.genops(content)][-1] == "STOP"
    except (ValueError, UnicodeDecodeError):
        return False
