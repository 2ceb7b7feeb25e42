"""One small corpus and the store made of it, converted once by two real processes and read by many tests."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elmo_stream.data.index import BACKENDS
from elmo_stream.data.shard import convert

ROWS = 1500
ODD_LABELS = ["naïve café", "tab\there", "line\nbreak", "\u2028separator", "日本語", " space ", 'quo"te']


@dataclass
class Corpus:
    """Input files and the options under which every test converts them."""

    train: Path
    test: Path
    options: dict[str, Any] = field(
        default_factory=lambda: {
            "tokenizer": "train:400",
            "max_length": 12,
            "rows_per_shard": 400,
            "part_bytes": 40_000,
            "seed": 7,
        }
    )

    def convert(self, out: Path, **changes: Any) -> dict[str, Any]:
        """Convert with the common options, changed by ``changes``."""
        return convert([self.train], out, test=[self.test], **(self.options | {"workers": 1} | changes))

    @staticmethod
    def rows(path: Path) -> list[dict[str, Any]]:
        """The instances of a file, as written."""
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write instances, one a line."""
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """1,500 training rows (some to be dropped, some with repeated labels) and 150 test rows (some unseen
    labels).
    """
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    words = [
        f"{stem}{end}" for stem in ("read", "Tensor", "file_", "größe", "check") for end in ("", "ing", "Sum", "s")
    ]

    def row(number: int, prefix: str) -> dict[str, Any]:
        labels = [f"{prefix}{int(chance.paretovariate(0.8)) % 300}" for _ in range(chance.randrange(1, 5))]
        if number % 10 == 0:
            labels.append(chance.choice(ODD_LABELS))
        return {"text": f"{number} {' '.join(chance.choices(words, k=chance.randrange(1, 9)))}", "labels": labels}

    train = [row(number, "label ") for number in range(ROWS)]
    train[5]["text"], train[6]["text"], train[700]["labels"] = "", " \t", []
    test = [row(number, "label " if number % 7 else "only in test ") for number in range(150)]
    test[3]["text"], test[4]["labels"] = "", []
    return Corpus(write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "test.jsonl", test))


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """1,500 training rows (some without labels) and 150 test rows of features with weights (some without features)."""
    folder, chance = tmp_path_factory.mktemp("features"), random.Random(1)

    def row(number: int, least: int) -> str:
        labels = chance.sample(range(300), k=chance.randrange(least, 5))
        entries = [f"{index}:{chance.gauss(0, 3):.4f}" for index in sorted(chance.sample(range(900), k=number % 9))]
        return f"{','.join(map(str, labels))} {' '.join(entries)}"

    options = {"max_length": 7, "rows_per_shard": 400, "part_bytes": 20_000, "seed": 7}
    corpus = Corpus(folder / "train.txt", folder / "test.txt", options)
    for path, rows in ((corpus.train, ROWS), (corpus.test, 150)):
        lines = "".join(f"{row(number, least=int(number % 50 > 0))}\n" for number in range(rows))
        path.write_text(f"{rows} 900 300\n{lines}")
    return corpus


@pytest.fixture(scope="session")
def sample_summary(sample: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The store, made by two worker processes, and what the conversion returned."""
    out = tmp_path_factory.mktemp("stores") / "store"
    return out, sample.convert(out, workers=2)


@pytest.fixture(scope="session")
def sample_store(sample_summary: tuple[Path, dict[str, Any]]) -> Path:
    """The store; tests that alter files copy it."""
    return sample_summary[0]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every storage backend in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def backend_store(backend: str, sample: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the sample in each backend."""
    out = tmp_path_factory.mktemp("stores") / backend
    sample.convert(out, store=backend)
    return out


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file below a folder, by relative path."""

    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return digests
