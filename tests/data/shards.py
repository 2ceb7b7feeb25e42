"""Small shards made by hand, and how tests tamper with stored ones."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from elmo_stream.data.index import ShardEntry, StoreIndex
from elmo_stream.data.store import Shard

ARRAYS = ("tokens", "token_offsets", "labels", "label_offsets", "token_weights")


def shard_of(rows: list[tuple[list[int], list[int]]], dtype: type = np.uint16) -> Shard:
    """A shard of (tokens, labels) rows."""
    return Shard(
        tokens=np.array([token for tokens, _ in rows for token in tokens], dtype),
        token_offsets=np.cumsum([0, *(len(tokens) for tokens, _ in rows)]),
        labels=np.array([label for _, labels in rows for label in labels], np.int64),
        label_offsets=np.cumsum([0, *(len(labels) for _, labels in rows)]),
    )


def assert_same(one: Shard, other: Shard) -> None:
    """Equal types and values of all arrays."""
    for name in ARRAYS:
        left, right = getattr(one, name), getattr(other, name)
        if left is None or right is None:
            assert left is right, name
            continue
        assert left.dtype == right.dtype and np.array_equal(left, right), name


def first_shard(store: Path) -> ShardEntry:
    """Entry of the first training shard."""
    return StoreIndex.load(store).splits["train"].shards[0]


def forged(entry: ShardEntry, name: str, content: bytes) -> ShardEntry:
    """An entry whose size and checksum of a file are those of ``content``, as a forger would write it."""
    listed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return dataclasses.replace(entry, files=entry.files | {name: listed})
