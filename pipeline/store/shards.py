"""Shards of rows: token ids in Parquet, hidden states in Arrow IPC that training maps. The only pyarrow schemas.

A shard is committed by a small JSON file beside it, written last, with its size and checksum. A shard that does not
match is never read: whoever finds it raises DamagedError, and the stage that made it makes it again.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DamagedError
from pipeline.store.records import Shard, StoredFile
from pipeline.store.step_store import StepDir

SHARD_TOKENS = 65_536
T = TypeVar("T")


def rows_per_shard(block_length: int) -> int:
    return max(1, SHARD_TOKENS // block_length)


def write_tokens(path: Path, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
    """Rows of token ids (rows, width) and how many are not padding: of each row (rows,), or what else the task
    counts (rows, several)."""
    columns = {"input_ids": _lists(ids)}
    columns |= {"length": pa.array(lengths)} if lengths.ndim == 1 else {"lengths": _lists(lengths)}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _lists(values: NDArray[np.int32]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def read_tokens(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What `write_tokens` wrote."""
    table = pq.read_table(path).combine_chunks()
    if "length" in table.column_names:
        return _matrix(table, "input_ids"), table.column("length").to_numpy()
    return _matrix(table, "input_ids"), _matrix(table, "lengths")


def _matrix(table: pa.Table, name: str) -> NDArray[np.int32]:
    """A column of lists of one length as (rows, length)."""
    chunks: Any = table.column(name).chunks
    values = chunks[0].flatten().to_numpy() if table.num_rows else np.empty(0, np.int32)
    found: NDArray[np.int32] = values.reshape(table.num_rows, table.schema.field(name).type.list_size)
    return found


def write_states(path: Path, states: Tensor, dtype: str) -> None:
    """Hidden states, such as (rows, length, hidden), as one uncompressed record batch, for mapping."""
    words = states.to(getattr(torch, dtype)).contiguous()
    flat = (words.view(torch.uint16) if dtype == "bfloat16" else words).numpy().reshape(-1)
    width = int(np.prod(states.shape[1:]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    batch = pa.record_batch([column], names=["states"])
    schema = batch.schema.with_metadata({"shape": json.dumps(list(states.shape)), "dtype": dtype})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def map_states(path: Path) -> tuple[NDArray[Any], str]:
    """A read-only view of mapped states (rows, length, hidden), and the dtype they stand for."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = file.schema.metadata
    shape = json.loads(metadata[b"shape"])
    column: Any = file.get_batch(0).column(0)
    values = column.flatten()
    return values.to_numpy(zero_copy_only=True).reshape(shape), metadata[b"dtype"].decode()


def to_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """fp32 of rows that `map_states` gave."""
    words = torch.from_numpy(np.array(rows))
    return (words.view(torch.bfloat16) if dtype == "bfloat16" else words).float()


def commit_shard(place: StepDir, name: str, rows: int, tokens: int, write: Callable[[Path], None]) -> Shard:
    """Write a shard to a temporary file, store it, then commit it by the JSON beside it."""
    with tempfile.TemporaryDirectory(dir=place.scratch_dir()) as folder:
        path = Path(folder) / name.replace("/", "-")
        write(path)
        stored = place.upload(name, path)
    shard = Shard(name=name, rows=rows, tokens=tokens)
    entry = {"shard": shard.model_dump(), "file": stored.model_dump()}
    place.write(f"{name}.json", json.dumps(entry).encode())
    return shard


def committed_shard(place: StepDir, name: str) -> Shard | None:
    """The shard if it is committed and sound; a damaged one counts as absent."""
    try:
        shard, stored = _entry(place, name)
        place.local(name, stored)
    except DamagedError:
        return None
    return shard


def open_shard(place: StepDir, name: str) -> Path:
    """A local, checked file. Raises DamagedError."""
    return place.local(name, _entry(place, name)[1])


def _entry(place: StepDir, name: str) -> tuple[Shard, StoredFile]:
    try:
        entry = json.loads(place.read(f"{name}.json"))
        return Shard.model_validate(entry["shard"]), StoredFile.model_validate(entry["file"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"The shard {name} of the {place.stage} step {place.key} is not committed.") from error


class Rows:
    """Random access to rows of a split by global row id, a bounded number of shards open at a time.

    Yields token ids (batch, width), lengths (batch,) or (batch, several) and, where `cache` is given, the teacher's
    states in fp32, such as (batch, length, hidden).
    """

    def __init__(
        self, tokens: StepDir, shards: Sequence[Shard], cache: StepDir | None = None, open_shards: int = 32
    ) -> None:
        self.shards = list(shards)
        self.rows = sum(shard.rows for shard in shards)
        self._tokens, self._cache = tokens, cache
        self._first = np.cumsum([0, *(shard.rows for shard in shards)])
        self._open: OrderedDict[int, tuple[Any, ...]] = OrderedDict()
        self._limit = open_shards

    def get(self, row_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        ids, lengths, states = [], [], []
        for row_id in row_ids:
            index = self._index(row_id)
            shard_ids, shard_lengths, shard_states, dtype = self._shard(index)
            row = row_id - int(self._first[index])
            ids.append(torch.from_numpy(shard_ids[row].astype(np.int64)))
            lengths.append(torch.from_numpy(np.asarray(shard_lengths[row], np.int64)))
            if shard_states is not None:
                states.append(to_tensor(shard_states[row], dtype))
        return torch.stack(ids), torch.stack(lengths), torch.stack(states) if states else None

    def lengths(self, row_ids: Sequence[int]) -> Tensor:
        """The lengths of each row, as `get` gives them."""
        found = []
        for row_id in row_ids:
            index = self._index(row_id)
            lengths = self._shard(index)[1][row_id - int(self._first[index])]
            found.append(torch.from_numpy(np.asarray(lengths, np.int64)))
        return torch.stack(found)

    def _index(self, row_id: int) -> int:
        return int(np.searchsorted(self._first, row_id, side="right")) - 1

    def _shard(self, index: int) -> tuple[Any, ...]:
        if index not in self._open:
            name = self.shards[index].name
            ids, lengths = read_tokens(open_shard(self._tokens, name))
            states, dtype = (None, "")
            if self._cache is not None:
                states, dtype = map_states(open_shard(self._cache, states_name(name)))
            self._open[index] = (ids, lengths, states, dtype)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


def states_name(tokens_name: str) -> str:
    """The cache's shard that belongs to a shard of token rows."""
    return tokens_name.removesuffix(".parquet") + ".arrow"
