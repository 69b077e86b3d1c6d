"""Shards of rows: token ids in Parquet, hidden states in Arrow IPC that training maps. The only pyarrow schemas.

A shard that does not match its checksum is never read: whoever finds it raises DamagedError, and the stage that made it
makes it again, in a file of another attempt.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def write_states(path: Path, states: Tensor, dtype: str) -> None:
    """Write hidden states, such as (rows, length, hidden), as one uncompressed record batch, for mapping."""
    words = states.to(getattr(torch, dtype)).contiguous()
    flat = (words.view(torch.uint16) if dtype == "bfloat16" else words).numpy().reshape(-1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(states.shape[1:])))
    batch = pa.record_batch([column], names=["states"])
    schema = batch.schema.with_metadata({"shape": json.dumps(list(states.shape)), "dtype": dtype})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def map_states(path: Path) -> tuple[NDArray[Any], str]:
    """Return a read-only view of mapped states (rows, length, hidden), and the dtype they stand for."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = file.schema.metadata
    column: Any = file.get_batch(0).column(0)
    values = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(json.loads(metadata[b"shape"])), metadata[b"dtype"].decode()


def to_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """Return rows that `map_states` gave as a tensor of the dtype they stand for."""
    words = torch.from_numpy(np.array(rows))
    return words.view(torch.bfloat16) if dtype == "bfloat16" else words


def store_shard(step_dir: StepDir, name: str, rows: int, tokens: int, write: Callable[[Path], None]) -> Shard:
    """Write a shard to a temporary file, and store it."""
    with tempfile.TemporaryDirectory(dir=step_dir.scratch_dir()) as folder:
        path = Path(folder) / name.replace("/", "-")
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
class StoredStates:
    """Hidden states of rows as a cache keeps them."""

    values: Tensor  # (rows, length, hidden), or (rows, sequences, length, hidden)

    def to(self, device: torch.device) -> StoredStates:
        """Return them on a device; the host does not wait for the copy if they are pinned."""
        return StoredStates(self.values.to(device, non_blocking=True))

    def float(self) -> Tensor:
        """Return the states, widened where they lie, fp32 as `values`."""
        return self.values.float()


@dataclass(frozen=True)
class _Open:
    """A shard of token rows in memory, and the states that belong to it, mapped."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    states: tuple[NDArray[Any], str] | None


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
        self._states = {shard.name: shard for shard in (cache.record.shards if cache is not None else ())}
        self._first = np.cumsum([0, *(shard.rows for shard in shards)])
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._limit, self._lock = open_shards, threading.Lock()

    def get(self, row_ids: Sequence[int], pin: bool = False) -> tuple[Tensor, Tensor, StoredStates | None]:
        """Return ids (batch, width), lengths (batch,) or (batch, several) and, of a cache, states as they are kept;
        with `pin`, in memory that a GPU of this process copies from while the host goes on."""
        parts, count = self._parts(row_ids), len(row_ids)
        ids = _gathered([(places, shard.ids[rows]) for places, rows, shard in parts], count, pin)
        lengths = _gathered([(places, shard.lengths[rows]) for places, rows, shard in parts], count, pin)
        mapped = [(places, rows, *shard.states) for places, rows, shard in parts if shard.states is not None]
        return ids, lengths, StoredStates(_states_of(mapped, count, pin)) if mapped else None

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
                shard, cache, states = self.shards[index], self._cache, None
                if cache is not None:
                    states = map_states(open_shard(cache.dir, self._states[states_name(shard.name)]))
                self._open[index] = _Open(*read_tokens(open_shard(self._tokens, shard)), states)
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


def _states_of(parts: Sequence[tuple[Places, Places, NDArray[Any], str]], count: int, pin: bool) -> Tensor:
    """Return mapped states, each row copied once to its place among so many; fp32 where shards hold several dtypes."""
    dtypes = {dtype for *_, dtype in parts}
    common = dtypes.pop() if len(dtypes) == 1 else "float32"
    gathered = _empty((count, *parts[0][2].shape[1:]), getattr(torch, common), pin)
    words = (gathered.view(torch.uint16) if common == "bfloat16" else gathered).numpy()
    for places, rows, states, dtype in parts:
        for place, row in zip(places, rows, strict=True):
            words[place] = states[row] if dtype == common else to_tensor(states[row], dtype).float().numpy()
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


def states_name(tokens_name: str) -> str:
    """Return the name of the cache's shard that belongs to a shard of token rows."""
    return tokens_name.removesuffix(".parquet") + ".arrow"
