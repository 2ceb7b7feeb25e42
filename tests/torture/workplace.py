"""What the attacks on training and sharding work on: a small corpus, its store, and what an undisturbed run gives."""

from pathlib import Path
from typing import Any

from elmo_stream.training.checkpoint import checkpoint_steps
from tests.conftest import _write_corpus
from tests.torture.children import Blow, Outcome, forked
from tests.training.left_behind import metrics_of, tensor_files

FORMATS = ("bf16", "fp8")
EVERY_STEPS, STEPS = 3, 20
_KEYS = ("encoder.dim=16", "encoder.dropout=0.2", "train.batch=64", f"checkpoint.every_steps={EVERY_STEPS}")


class Workplace:
    """A corpus of 700 lines and its store in ``folder``; every command prints to ``log``."""

    def __init__(self, folder: Path) -> None:
        self.store, self.log = folder / "store", folder / "log"
        self._corpus = folder / "corpus"
        self._corpus.mkdir()
        _write_corpus(self._corpus / "train.jsonl", 600, seed=1)
        _write_corpus(self._corpus / "test.jsonl", 100, seed=2)
        must(forked().run(*self.shard_arguments(self.store), log=self.log))

    @property
    def texts(self) -> Path:
        """A file to predict from."""
        return self._corpus / "test.jsonl"

    def shard_arguments(self, out: Path, workers: int = 1, store: str = "zarr", rows: int = 128) -> tuple[object, ...]:
        """The conversion of the corpus to a store in ``out``, in shards of so many rows."""
        files = (self._corpus / "train.jsonl", "--test", self.texts)
        options = ("--tokenizer", "train:300", "--rows-per-shard", rows, "--workers", workers, "--store", store)
        return ("shard", *files, "--out", out, *options)

    def train_arguments(self, run: Path, fmt: str) -> tuple[object, ...]:
        """Two epochs of ten steps, with a checkpoint every three."""
        keys = [part for key in (*_KEYS, f"classifier.format={fmt}") for part in ("--set", key)]
        return ("train", self.store, "--out", run, "--epochs", 2, *keys)

    def go_on(self, run: Path, fmt: str, blow: Blow | None = None) -> Outcome:
        """Resume a run, or begin it where there is none yet."""
        arguments = ("resume", run) if (run / "run.json").is_file() else self.train_arguments(run, fmt)
        return forked().run(*arguments, log=self.log, blow=blow)


def must(outcome: Outcome) -> None:
    """Undisturbed commands succeed, or no attack can be judged."""
    if outcome.code:
        raise RuntimeError(f"exit code {outcome.code}: {outcome.output}")


def result_of(run: Path) -> dict[str, Any]:
    """Final weights and optimizer state, by their checksums, and the metrics but for the rates."""
    (*_, step) = checkpoint_steps(run)
    return {"step": step, "metrics": metrics_of(run), **tensor_files(run, step)}


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
