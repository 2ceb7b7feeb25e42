"""Make a store of any number of labels and instances, as fast as the disk writes, for measurements of memory and time.

    python tools/synthetic_store.py --out STORE --labels 100000000 --instances 20000 --test 64

It is a store like any other: checksums, label names (eight hexadecimal digits), frequencies counted from the instances
and falling, a tokenizer. Its texts are random words and mean nothing; where labels outnumber the positives, most labels
have no instance, which no conversion of text would give.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.index import LabelsEntry, Propensity, ShardEntry, SplitEntry, StoreIndex, TokenizerEntry
from elmo_stream.data.store import Shard, ShardStore, create_store
from elmo_stream.data.tokenize import open_tokenizer
from elmo_stream.files import file_entry, flush_and_forget, list_files

POSITIVES, WORDS, NAME_BYTES, PIECE = 3, 600, 8, 1 << 20
_HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


def make_store(out: Path, *, labels: int, instances: int, test: int, tokens: int, rows_per_shard: int) -> None:
    """Write the store; ``tokens`` is the length of the longest text."""
    out.mkdir(parents=True)
    tokenizer = open_tokenizer("train:1000", tokens, [f"word{number}" for number in range(WORDS)])
    (out / "tokenizer").mkdir()
    tokenizer.save(out / "tokenizer")
    store = create_store("zarr", out, vocab_size=tokenizer.vocab_size, num_labels=labels)
    shards = [(first, min(first + rows_per_shard, instances)) for first in range(0, instances, rows_per_shard)]
    drawn = np.concatenate([_draw(labels, last - first, key=first) for first, last in shards])
    known, inverse, count = np.unique(drawn, return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    rank = np.empty(len(known), dtype=np.int64)
    rank[order] = np.arange(len(known))
    train = np.sort(rank[inverse.reshape(drawn.shape)], axis=1)
    splits = {"train": _write_split(store, "train", train, tokenizer.vocab_size, tokens, rows_per_shard)}
    if test:  # with labels of the training split
        others = _draw(len(known), test, key=instances)
        splits["test"] = _write_split(store, "test", others, tokenizer.vocab_size, tokens, rows_per_shard)
    (out / "labels").mkdir()
    frequency = np.zeros(labels, dtype=np.uint32)
    frequency[: len(known)] = count[order]
    _write_array(out / "labels" / "frequency.npy", labels, "<u4", iter([frequency]))
    starts = ((first, np.arange(first, last) * NAME_BYTES) for first, last in _pieces(labels + 1))
    _write_array(out / "labels" / "offsets.npy", labels + 1, "<i8", (values for _, values in starts))
    with open(out / "labels" / "names.bin", "wb") as stream:
        for first, last in _pieces(labels):
            digits = (np.arange(first, last)[:, None] >> (4 * np.arange(NAME_BYTES)[::-1])) & 15
            stream.write(_HEX[digits].tobytes())
    flush_and_forget(out / "labels" / "names.bin")
    StoreIndex(
        backend="zarr",
        seed=0,
        rows_per_shard=rows_per_shard,
        tokenizer=TokenizerEntry(
            kind=tokenizer.kind,
            source="synthetic",
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            max_length=tokenizer.max_length,
            files=list_files(out / "tokenizer"),
        ),
        labels=LabelsEntry(labels, {path.name: file_entry(path) for path in sorted((out / "labels").iterdir())}),
        propensity=Propensity(0.55, 1.5),
        filters={},
        splits=splits,
    ).save(out)


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + PIECE, count)) for first in range(0, count, PIECE))


def _draw(labels: int, instances: int, *, key: int) -> NDArray[np.int64]:
    """Three distinct labels of each instance, ascending, low ones more often."""
    words = np.random.Philox(key=key).random_raw(instances * POSITIVES).reshape(-1, POSITIVES)
    share = (words >> np.uint64(11)).astype(np.float64) / 2**53
    return np.sort((share**3 * (labels - POSITIVES + 1)).astype(np.int64), axis=1) + np.arange(POSITIVES)


def _write_split(
    store: ShardStore, split: str, labels_BP: NDArray[np.int64], vocabulary: int, tokens: int, rows_per_shard: int
) -> SplitEntry:
    shards: list[ShardEntry] = []
    rng = np.random.default_rng(len(split))
    for number, first in enumerate(range(0, len(labels_BP), rows_per_shard)):
        ids = labels_BP[first : first + rows_per_shard]
        lengths = rng.integers(1, tokens + 1, len(ids))
        shard = Shard(
            tokens=rng.integers(1, vocabulary, int(lengths.sum())).astype(np.uint16),
            token_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            labels=ids.reshape(-1),
            label_offsets=np.arange(len(ids) + 1) * POSITIVES,
        )
        shards.append(store.write_shard(split, f"shard-{number:05d}", shard))
    sums = {key: sum(getattr(shard, key) for shard in shards) for key in ("rows", "tokens", "positives")}
    return SplitEntry(
        instances=sums["rows"],
        tokens=sums["tokens"],
        positives=sums["positives"],
        truncated=0,
        dropped={},
        unseen_labels=0,
        duplicate_labels=0,
        shards=tuple(shards),
    )


def _write_array(path: Path, length: int, dtype: str, pieces: Iterator[NDArray[Any]]) -> None:
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": (length,)})
        for values in pieces:
            stream.write(values.astype(dtype).tobytes())
    flush_and_forget(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows-per-shard", type=int, default=65_536)
    make_store(**vars(parser.parse_args()))
