"""Small stores and runs for attacks that need many of them."""

import json
import random
from pathlib import Path

from elmo_stream.config import load_config
from elmo_stream.data.shard import convert
from elmo_stream.training.trainer import train

SMALL = [
    "encoder.dim=16", "encoder.bigrams=64", "train.batch=32", "train.steps=4", "train.validation=0.1", "threads=1",
    "checkpoint.every_steps=2", "checkpoint.keep=2", "loader.bucket=2",
]  # fmt: skip


def quiet(line: str) -> None:
    """Reports nothing."""


def write_corpus(path: Path, rows: int, seed: int = 0, labels: int = 40) -> Path:
    """Instances with ids of labels; each text names its labels."""
    chance = random.Random(seed)
    with open(path, "w") as stream:
        for _ in range(rows):
            ids = sorted(chance.sample(range(labels), k=chance.randint(1, 3)))
            words = [f"topic{label} {chance.choice('abcdefgh')}" for label in ids]
            stream.write(json.dumps({"text": " ".join(words), "labels": ids}) + "\n")
    return path


def make_store(folder: Path, backend: str = "zarr", *, rows: int = 160, rows_per_shard: int = 64) -> Path:
    """A store with a test split and a filter, in ``folder/store-BACKEND``."""
    train_file, test_file = folder / f"{backend}-train.jsonl", folder / f"{backend}-test.jsonl"
    write_corpus(train_file, rows), write_corpus(test_file, 30, seed=1)
    (folder / "filter.txt").write_text("0 3\n7 5\n")
    out = folder / f"store-{backend}"
    convert(
        [train_file], out, test=[test_file], filter=folder / "filter.txt", tokenizer="train:100", max_length=8,
        store=backend, rows_per_shard=rows_per_shard, workers=1, report=quiet,
    )  # fmt: skip
    return out


def make_run(store: Path, out: Path, *keys: str) -> Path:
    """A finished run of four steps with checkpoints of steps 2 and 4."""
    assert train(store, out, load_config(None, [*SMALL, *keys]), report=quiet) == 0
    return out
