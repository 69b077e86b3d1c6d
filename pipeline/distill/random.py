"""Random draws that depend on nothing but what they are named by."""

from __future__ import annotations

import hashlib

import torch


def draw(*parts: int | str) -> torch.Generator:
    """Return a random generator that depends on `parts` alone, such as (seed, step, row)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
