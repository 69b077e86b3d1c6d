"""Shards of rows: token ids in Parquet, a teacher's cache in Arrow IPC that training maps. The only pyarrow schemas.

A shard that does not match its checksum is never read: whoever finds it raises DamagedError, and the stage that made it
makes it again, in a file of another attempt.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DamagedError
from pipeline.store.records import Shard, TeacherCache
from pipeline.store.step_store import FinishedStep, StepDir

SHARD_TOKENS = 65_536
Places = NDArray[np.int64]


def rows_per_shard(block_length: int) -> int:
    """Return how many rows of a length make a shard."""
    return max(1, SHARD_TOKENS // block_length)


def write_tokens(path: Path, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
    """Write rows of ids (rows, width) and how many are not padding (rows,), or what the task counts (rows, several)."""
    columns = {"input_ids": _lists(ids)}
    columns |= {"length": pa.array(lengths)} if lengths.ndim == 1 else {"lengths": _lists(lengths)}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _lists(values: NDArray[np.int32]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def read_tokens(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Read what `write_tokens` wrote."""
    table = pq.read_table(path).combine_chunks()
    plain = "length" in table.column_names
    return _matrix(table, "input_ids"), table.column("length").to_numpy() if plain else _matrix(table, "lengths")


def _matrix(table: pa.Table, name: str) -> NDArray[np.int32]:
    """Return a column of lists of one length as (rows, length)."""
    chunks: Any = table.column(name).chunks
    values = chunks[0].flatten().to_numpy() if table.num_rows else np.empty(0, np.int32)
    matrix: NDArray[np.int32] = values.reshape(table.num_rows, table.schema.field(name).type.list_size)
    return matrix


@dataclass(frozen=True)
class Stored(ABC):
    """Tensors of rows as a cache keeps them."""

    COLUMNS: ClassVar[tuple[str, ...]]  # of a shard, as many as there are tensors
    values: Tensor  # (rows, length, width), or (rows, sequences, length, width)

    @property
    def dtype(self) -> str:
        """Return the name of what is kept of a value."""
        return str(self.values.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the values, and what else belongs to them."""
        return tuple(tensor for tensor in vars(self).values() if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return what `change` makes of each tensor."""
        return type(self)(*map(change, self.tensors))

    def to(self, device: torch.device) -> Self:
        """Return them on a device; the host does not wait for the copy if they are pinned."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    @abstractmethod
    def wide(self) -> Tensor:
        """Return the values as they are computed with, widened where they lie."""


@dataclass(frozen=True)
class StoredStates(Stored):
    """Hidden states: floats, or int8 codes with a scale for each token, and for each channel of a row, of which some
    are far larger than the others. A state is the product of the three, fp32."""

    COLUMNS = ("states", "scales", "channels")
    scales: Tensor | None = None  # of codes: fp32 (rows, length), or (rows, sequences, length)
    channels: Tensor | None = None  # of codes: fp32 (rows, hidden)

    @classmethod
    def of(cls, states: Tensor, dtype: str) -> StoredStates:
        """Return states as a cache of this dtype keeps them."""
        if dtype != "int8":
            return cls(states.to(getattr(torch, dtype)))
        channels = _or_one(states.abs().flatten(1, -2).amax(1).float())
        level = states / _beside(channels, states)
        scales = _or_one(level.abs().amax(-1)) / 127
        return cls((level / scales.unsqueeze(-1)).round().to(torch.int8), scales, channels)

    def wide(self) -> Tensor:
        widened = self.values.float()
        if self.scales is None or self.channels is None:
            return widened
        return widened * self.scales.unsqueeze(-1) * _beside(self.channels, widened)


@dataclass(frozen=True)
class StoredDraws(Stored):
    """Tokens that were drawn from the teacher's distribution at each position, each as often as it was drawn, in the
    smallest unsigned integers that hold the vocabulary; int64 to compute with."""

    COLUMNS = ("draws",)

    def wide(self) -> Tensor:
        return self.values.long()


def dtype_of_ids(vocabulary: int) -> str:
    """Return the name of the smallest unsigned integer that holds every id below so many."""
    return next(f"uint{bits}" for bits in (8, 16, 32) if vocabulary <= 2**bits)


def _or_one(magnitudes: Tensor) -> Tensor:
    return magnitudes.masked_fill(magnitudes == 0, 1)


def _beside(channels: Tensor, states: Tensor) -> Tensor:
    return channels.view(len(channels), *(1,) * (states.ndim - 2), -1)


class Mapped(NamedTuple):
    """The tensors of a shard of a cache in its file, read-only, and the dtype of their values: numpy has no bfloat16,
    whose words are uint16."""

    dtype: str
    arrays: tuple[NDArray[Any], ...]


def write_stored(path: Path, stored: Stored) -> None:
    """Write what a cache keeps of rows as one uncompressed record batch, for mapping."""
    arrays, columns = [_words(tensor) for tensor in stored.tensors], []
    for array in arrays:
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), int(np.prod(array.shape[1:]))))
    batch = pa.record_batch(columns, names=list(stored.COLUMNS[: len(columns)]))
    shapes = json.dumps([array.shape for array in arrays])
    schema = batch.schema.with_metadata({"shapes": shapes, "dtype": stored.dtype})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def map_stored(path: Path) -> Mapped:
    """Return a view of what `write_stored` wrote."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    batch, metadata = file.get_batch(0), file.schema.metadata
    columns: Any = batch.columns
    flat = (column.flatten().to_numpy(zero_copy_only=True) for column in columns)
    arrays = tuple(a.reshape(shape) for a, shape in zip(flat, json.loads(metadata[b"shapes"]), strict=True))
    return Mapped(metadata[b"dtype"].decode(), arrays)


def to_stored(dtype: str, arrays: Sequence[NDArray[Any]]) -> Stored:
    """Return rows of what `map_stored` gave in memory."""
    words = [torch.from_numpy(np.array(array)) for array in arrays]
    return _kind(dtype)(words[0].view(torch.bfloat16) if dtype == "bfloat16" else words[0], *words[1:])


def _kind(dtype: str) -> type[Stored]:
    """Return what values of a dtype are: states have signs, and tokens have none."""
    return StoredDraws if dtype.startswith("uint") else StoredStates


def _words(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as numpy sees it, in the same memory if that lies in order."""
    words: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return words


def store_shard(step_dir: StepDir, name: str, rows: int, tokens: int, write: Callable[[Path], None]) -> Shard:
    """Write a shard to a temporary file, and store it."""
    with step_dir.scratch_folder() as folder:
        path = folder / name.replace("/", "-")
        write(path)
        return Shard(name=name, rows=rows, tokens=tokens, file=step_dir.upload(name, path))


def is_sound(step_dir: StepDir, shard: Shard) -> bool:
    """Tell whether a shard is there as it was stored."""
    try:
        open_shard(step_dir, shard)
    except DamagedError:
        return False
    return True


def open_shard(step_dir: StepDir, shard: Shard) -> Path:
    """Return a local, checked file. Raises DamagedError."""
    return step_dir.local(shard.name, shard.file)


@dataclass(frozen=True)
class _Open:
    """A shard of token rows in memory, and what is cached beside it, mapped."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    cached: Mapped | None


class Rows:
    """Random access to rows of a split by global row id, a bounded number of shards open at a time. One thread may read
    ahead while another reads."""

    def __init__(
        self,
        tokens: StepDir,
        shards: Sequence[Shard],
        cache: FinishedStep[TeacherCache] | None = None,
        open_shards: int = 32,
    ) -> None:
        self.shards = list(shards)
        self.rows = sum(shard.rows for shard in shards)
        self._tokens, self._cache = tokens, cache
        self._cached = {shard.name: shard for shard in (cache.record.shards if cache is not None else ())}
        self._first = np.cumsum([0, *(shard.rows for shard in shards)])
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._limit, self._lock = open_shards, threading.Lock()

    def get(self, row_ids: Sequence[int], pin: bool = False) -> tuple[Tensor, Tensor, Stored | None]:
        """Return ids (batch, width), lengths (batch,) or (batch, several) and, of a cache, what it keeps, as it does;
        with `pin`, in memory that a GPU of this process copies from while the host goes on."""
        parts, count = self._parts(row_ids), len(row_ids)
        ids = _gathered([(places, shard.ids[rows]) for places, rows, shard in parts], count, pin)
        lengths = _gathered([(places, shard.lengths[rows]) for places, rows, shard in parts], count, pin)
        mapped = [(places, rows, shard.cached) for places, rows, shard in parts if shard.cached is not None]
        return ids, lengths, _stored_of(mapped, count, pin) if mapped else None

    def drawn(self, count: int) -> list[int]:
        """Return the ids, in order, of the `count` rows whose contents hash lowest; all ids if there are no more.

        The sample is a function of what the rows hold: no seed and no order of shards shows in it, and rows that are
        added displace few of it. All rows are read once for it, a shard at a time.
        """
        if count >= self.rows:
            return list(range(self.rows))
        arrays = (read_tokens(open_shard(self._tokens, shard)) for shard in self.shards)
        hashes = np.concatenate([row_hashes(*pair) for pair in arrays])
        return sorted(int(row) for row in np.argsort(hashes, kind="stable")[:count])

    def lengths(self, row_ids: Sequence[int]) -> Tensor:
        """Return the lengths of each row, as `get` gives them."""
        return _gathered([(p, shard.lengths[rows]) for p, rows, shard in self._parts(row_ids)], len(row_ids))

    def _parts(self, row_ids: Sequence[int]) -> list[tuple[Places, Places, _Open]]:
        """Return the open shards that hold the rows, each with their places among `row_ids` and in the shard."""
        wanted = np.asarray(row_ids, np.int64)
        indexes = np.searchsorted(self._first, wanted, side="right") - 1
        places = {int(index): np.flatnonzero(indexes == index) for index in np.unique(indexes)}
        return [(here, wanted[here] - self._first[index], self._shard(index)) for index, here in places.items()]

    def _shard(self, index: int) -> _Open:
        with self._lock:
            if index not in self._open:
                shard, cache, cached = self.shards[index], self._cache, None
                if cache is not None:
                    cached = map_stored(open_shard(cache.dir, self._cached[cached_name(shard.name)]))
                self._open[index] = _Open(*read_tokens(open_shard(self._tokens, shard)), cached)
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            self._open.move_to_end(index)
            return self._open[index]


def _gathered(parts: Sequence[tuple[Places, NDArray[np.int32]]], count: int, pin: bool = False) -> Tensor:
    """Return rows, each at its place among so many, int64."""
    gathered = _empty((count, *parts[0][1].shape[1:]), torch.int64, pin)
    for places, rows in parts:
        gathered.numpy()[places] = rows
    return gathered


def _stored_of(parts: Sequence[tuple[Places, Places, Mapped]], count: int, pin: bool) -> Stored:
    """Return what is mapped, each row copied once to its place among so many; fp32 where shards hold several dtypes."""
    dtypes, arrays = {mapped.dtype for *_, mapped in parts}, parts[0][2].arrays
    several = len(dtypes) > 1
    kinds = [torch.float32] if several else [getattr(torch, *dtypes), torch.float32, torch.float32]
    shapes = ((count, *array.shape[1:]) for array in arrays)
    tensors = (_empty(shape, kind, pin) for shape, kind in zip(shapes, kinds, strict=False))
    gathered = _kind(parts[0][2].dtype)(*tensors)
    words = [_words(tensor) for tensor in gathered.tensors]
    for places, rows, whole in parts:
        for place, row in zip(places, rows, strict=True):
            mapped = [array[row : row + 1] for array in whole.arrays]
            if several:
                mapped = [to_stored(whole.dtype, mapped).wide().numpy()]
            for into, array in zip(words, mapped, strict=True):
                into[place] = array
    return gathered


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=pin and torch.cuda.is_available())


def row_hashes(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return a hash of the content of each row, (rows,), by which rows are drawn."""
    contents = (row.tobytes() + length.tobytes() for row, length in zip(ids, lengths, strict=True))
    return np.array([_hash(content) for content in contents], np.uint64)


def drawn_shards(shards: Sequence[Shard], count: int) -> list[Shard]:
    """Return, in order, the `count` shards whose names hash lowest, for a sample of a split too large to be read."""
    lowest = sorted(shards, key=lambda shard: _hash(shard.name.encode()))[:count]
    return [shard for shard in shards if shard in lowest]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def cached_name(tokens_name: str) -> str:
    """Return the name of the cache's shard that belongs to a shard of token rows."""
    return tokens_name.removesuffix(".parquet") + ".arrow"
