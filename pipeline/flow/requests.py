"""How many requests a run makes to S3, counted from shards, parts of large objects, heartbeats and checkpoints.

`writes` are what S3 counts as such, which cost more: PUT, POST, and listings. All others are `reads`. Text and models
that are read from S3 are not counted, nor tries that fail; nodes have no copies before a step begins. What a run makes
is within 15 % of it, as tests/flow/test_requests.py shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.store.lease import HEARTBEAT_S

PART_BYTES = 8 * 2**20  # of an object: one that is larger travels in so many


@dataclass(frozen=True)
class Requests:
    """Requests to S3, by what they cost."""

    writes: float = 0.0
    reads: float = 0.0

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.writes + other.writes, self.reads + other.reads)

    def __mul__(self, times: float) -> Requests:
        return Requests(self.writes * times, self.reads * times)


NONE = Requests()
# The plan looks for the record, then the lease is taken, the command told, the record made, attempts listed.
STEP = Requests(writes=10, reads=12)
DOCUMENT = Requests(writes=1, reads=1)  # a small file: a look at the lease, and the file
BEAT = Requests(writes=1, reads=2)  # the lease, read and written, and a look at it
LISTED = Requests(writes=2)  # the files of a step: its attempts, then those of one
FILES = 6  # that a step stores or reads beside shards: weights, histories, tokenizer


def stored(size: float) -> Requests:
    """Return the requests that store an object of so many bytes, a look at the lease among them."""
    parts = math.ceil(size / PART_BYTES)
    return Requests(writes=1 if parts <= 1 else parts + 2, reads=1)


def fetched(size: float) -> Requests:
    """Return the requests that fetch an object of so many bytes."""
    return Requests(reads=max(1, math.ceil(size / PART_BYTES)))


def of_step(seconds: float, parameters: int) -> Requests:
    """Return what any step makes that takes so long, and stores or reads a model's weights."""
    weights = stored(4 * parameters) + fetched(4 * parameters)
    return STEP + BEAT * (seconds / HEARTBEAT_S) + (stored(0) + fetched(0)) * FILES + weights


def of_rows(shards: float, shard_bytes: float, parts: float = 0.0) -> Requests:
    """Return what storing shards makes, and a document for each of the parts that they are made in."""
    return stored(shard_bytes) * shards + DOCUMENT * parts + LISTED


def of_checkpoints(count: float, parameters: int) -> Requests:
    """Return what checkpoints make: weights, the best ones, two moments; a marker; and the one before is found and
    deleted."""
    return (stored(16 * parameters) + DOCUMENT + LISTED * 2 + Requests(reads=4)) * count
