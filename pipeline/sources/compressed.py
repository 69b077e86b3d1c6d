"""Compressed files of text, read as a stream: what they unpack to is never whole, in memory or on a disk."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import ConfigError


def _zstd(stream: BinaryIO) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))


STREAMS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}
ZIP = ".zip"  # which may hold several files
COMPRESSIONS = (*STREAMS, ZIP)
READ_BYTES = 2**20
# What an OSError says of damaged data, which is none of a disk or a connection.
DAMAGE = ("Invalid data stream", "ZSTD", "Truncated", "Not a gzipped file", "CRC check failed")


@contextlib.contextmanager
def unpacking(stream: BinaryIO, compression: str, member: str, uri: str) -> Iterator[BinaryIO]:
    """Yield a stream of what a compressed stream holds; of a .zip, its file of a name. Raises ConfigError: what is read
    is damaged, ends too early, or is encrypted."""
    try:
        if compression == ZIP:
            with zipfile.ZipFile(stream) as archive, archive.open(member) as inside:
                yield io.BufferedReader(inside)  # type: ignore[type-var]
        else:
            with STREAMS[compression](stream) as unpacked:
                yield unpacked
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _damaged(uri, compression, error) from error
    except (OSError, RuntimeError) as error:
        if not str(error).startswith(DAMAGE) and "encrypted" not in str(error):
            raise
        raise _damaged(uri, compression, error) from error


def _damaged(uri: str, compression: str, error: Exception) -> ConfigError:
    return ConfigError(f"data: {uri} cannot be unpacked ({compression}): {error or type(error).__name__}")


def members(stream: BinaryIO, uri: str) -> dict[str, int]:
    """Return the files in a .zip, in the order of their names, and the bytes that each unpacks to. Raises ConfigError:
    it is none."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return {info.filename: info.file_size for info in sorted_files(archive)}
    except zipfile.BadZipFile as error:
        raise _damaged(uri, ZIP, error) from error


def sorted_files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files of an archive, without folders and what macOS puts beside them."""
    files = (info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/"))
    return sorted(files, key=lambda info: info.filename)


def count_bytes(stream: BinaryIO) -> int:
    """Return how many bytes a stream has left, all of them read."""
    return sum(len(piece) for piece in iter(lambda: stream.read(READ_BYTES), b""))


def skip(stream: BinaryIO, count: int) -> None:
    """Read so many bytes of a stream, to go on behind them; it need not be able to seek."""
    while count > 0 and (piece := stream.read(min(count, READ_BYTES))):
        count -= len(piece)
