"""Synthetic data for the benchmarks: Zipf-distributed tokens, words and labels; the same for the same seed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elmo_stream.data.index import LabelsEntry, Propensity, SplitEntry, StoreIndex, TokenizerEntry
from elmo_stream.data.store import Shard, create_store, offsets_of

VOCABULARY = 30_000
WORDS = 50_000
ROWS_PER_SHARD = 65_536
MOST_LABELS, MOST_WORDS = 5, 38
BLOCK = 10_000


def synthetic_shard(rows: int, tokens: int, labels: int, seed: int, *, uniform: bool = False) -> Shard:
    """Rows of ``tokens`` token ids and 1 to 5 of ``labels`` labels; ``uniform`` ids do not compress."""
    chance = np.random.default_rng(seed)
    if uniform:
        token_ids = chance.integers(0, VOCABULARY, rows * tokens, dtype=np.uint16)
    else:
        token_ids = np.minimum(chance.zipf(1.2, rows * tokens), VOCABULARY - 1).astype(np.uint16)
    counts = chance.integers(1, MOST_LABELS + 1, rows)
    offsets = offsets_of(counts)
    # Ascending and distinct within a row: a random start and random steps that stay within the labels.
    steps = chance.integers(1, max(2, labels // (MOST_LABELS + 1)), int(offsets[-1]))
    sums = np.cumsum(steps)
    before = np.concatenate([[0], sums])[offsets[:-1]]
    return Shard(token_ids, offsets_of(np.full(rows, tokens)), sums - np.repeat(before, counts), offsets)


def synthetic_store(
    folder: Path, backend: str, documents: int, tokens: int, labels: int, *, uniform: bool = False
) -> None:
    """A store with a training split only, eight shards over and over; labels and tokenizer are names alone."""
    store = create_store(backend, folder, vocab_size=VOCABULARY, num_labels=labels)
    rows = min(ROWS_PER_SHARD, documents)
    shards = [synthetic_shard(rows, tokens, labels, seed, uniform=uniform) for seed in range(8)]
    entries = []
    for number, first in enumerate(range(0, documents, ROWS_PER_SHARD)):
        shard = shards[number % len(shards)].rows_between(0, min(ROWS_PER_SHARD, documents - first))
        entries.append(store.write_shard("train", f"shard-{number:05d}", shard))
    split = SplitEntry(
        instances=documents,
        tokens=sum(entry.tokens for entry in entries),
        positives=sum(entry.positives for entry in entries),
        truncated=0,
        dropped={},
        unseen_labels=0,
        duplicate_labels=0,
        shards=tuple(entries),
    )
    StoreIndex(
        backend=backend,
        seed=0,
        rows_per_shard=ROWS_PER_SHARD,
        tokenizer=TokenizerEntry("trained", "synthetic", "0" * 64, VOCABULARY, 0, tokens, {}),
        labels=LabelsEntry(labels, {}),
        propensity=Propensity(0.55, 1.5),
        splits={"train": split},
        filters={},
    ).save(folder)


def synthetic_lines(documents: int, labels: int, seed: int) -> Iterator[bytes]:
    """Lines of JSONL: 20 to 38 words, some 39 tokens; 1 to 5 labels. All seeds share their words, as a corpus does."""
    language, chance = np.random.default_rng(0), np.random.default_rng([1, seed])
    letters, weights = np.array(list("etaoinshrdlucmfwypvbgkjqxz")), 1 / np.arange(1, 27)
    weights /= weights.sum()
    words = ["".join(language.choice(letters, size, p=weights)) for size in language.integers(2, 11, WORDS)]
    for first in range(0, documents, BLOCK):
        rows = min(BLOCK, documents - first)
        chosen = ((chance.zipf(1.15, (rows, MOST_WORDS)) - 1) % WORDS).tolist()
        named = ((chance.zipf(1.2, (rows, MOST_LABELS)) - 1) % labels).tolist()
        sizes = zip(chance.integers(20, MOST_WORDS + 1, rows), chance.integers(1, MOST_LABELS + 1, rows), strict=True)
        for row, (words_kept, labels_kept) in enumerate(sizes):
            text = " ".join([words[i] for i in chosen[row][:words_kept]])
            line = {"text": text, "labels": [f"label {i}" for i in named[row][:labels_kept]]}
            yield json.dumps(line).encode() + b"\n"
