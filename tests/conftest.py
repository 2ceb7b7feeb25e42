"""What holds for every test."""

import json
import os
import random
from pathlib import Path

import pytest

# Processes that tests start inherit it: a test that reaches for the network fails on every machine alike.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where there is no CUDA GPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


def _write_corpus(path: Path, instances: int, seed: int) -> None:
    """Lines whose words tell their labels: word i of a text goes with label i."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(instances):
            topics = [min(int(rng.expovariate(1 / 500)), 2599) for _ in range(rng.randint(1, 5))]
            words = [word for topic in topics for word in (f"word{topic}", rng.choice("abcdefgh"))]
            row = {"text": " ".join(words), "labels": sorted({f"label {topic}" for topic in topics})}
            stream.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (1,500 instances, over 1,024 labels) and test.jsonl (200 instances)."""
    folder = tmp_path_factory.mktemp("corpus")
    _write_corpus(folder / "train.jsonl", 1500, seed=1)
    _write_corpus(folder / "test.jsonl", 200, seed=2)
    return folder


@pytest.fixture(scope="session")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the corpus in shards of 256 instances."""
    from elmo_stream.data.shard import convert

    folder = tmp_path_factory.mktemp("stores") / "store"
    convert(
        [corpus / "train.jsonl"],
        folder,
        test=[corpus / "test.jsonl"],
        tokenizer="train:1200",
        max_length=32,
        rows_per_shard=256,
        workers=1,
        report=lambda line: None,
    )
    return folder


@pytest.fixture(scope="session")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on the store."""
    from tests.cli_helpers import BAG, run_cli

    folder = tmp_path_factory.mktemp("runs") / "run"
    result = run_cli("train", store, "--out", folder, *BAG)
    assert result.exit_code == 0, result.output
    return folder
