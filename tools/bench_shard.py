"""Documents a second of sharding, beside the tokenizer alone in as many processes of the same run; and its memory.

    python -m tools.bench_shard [--store webdataset] [--documents 2000000]

The tokenizer alone gets texts that are in memory already, and its ids are extracted. Memory is the largest sum of the
resident memory of all processes, seen ten times a second.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from elmo_stream.data.index import BACKENDS
from elmo_stream.data.shard import convert
from elmo_stream.data.tokenize import Tokenizer, open_tokenizer
from elmo_stream.data.workers import Workers
from elmo_stream.system import available_cpus
from tools.synthetic import synthetic_lines

FILES = 8
TEXTS_TO_TRAIN_ON = 50_000
BATCH_ROWS = 1024


@dataclass(frozen=True)
class FileTask:
    """A file to write or to tokenise."""

    path: Path
    documents: int
    labels: int
    tokenizer: Path


def write_file(task: FileTask) -> None:
    """Write a file of synthetic lines."""
    with open(task.path, "wb") as stream:
        stream.writelines(synthetic_lines(task.documents, task.labels, seed=int(task.path.stem)))


def tokenize_file(task: FileTask) -> float:
    """Documents a second of the tokenizer over the texts of a file."""
    tokenizer = Tokenizer.load(task.tokenizer)
    texts = texts_of(task.path)
    started = time.perf_counter()
    for first in range(0, len(texts), BATCH_ROWS):
        tokenizer.encode_batch(texts[first : first + BATCH_ROWS])
    return len(texts) / (time.perf_counter() - started)


def texts_of(path: Path, most: int | None = None) -> list[str]:
    """The first texts of a file, or all."""
    with open(path, "rb") as stream:
        return [json.loads(line)["text"] for line in islice(stream, most)]


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Fills a list with the resident memory, in MiB, of this process and its descendants."""
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.append(_resident_mib(Path("/proc/self").resolve().name))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _resident_mib(process: str) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = Path(f"/proc/{process}/task").glob("*/children")
        return pages * 4096 // 2**20 + sum(
            _resident_mib(child) for each in children for child in each.read_text().split()
        )
    except OSError:  # ended meanwhile
        return 0


def main() -> None:
    """Parse, write the corpus, measure both, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", choices=BACKENDS, default="zarr")
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=available_cpus())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-shard-") as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        tasks = [
            FileTask(folder / f"{number}.jsonl", given.documents // FILES, given.labels, folder / "tokenizer")
            for number in range(FILES)
        ]
        with Workers(given.workers) as pool:
            pool.map(write_file, tasks, _say_nothing)
            texts = texts_of(tasks[0].path, TEXTS_TO_TRAIN_ON)
            open_tokenizer("train:16000", 128, texts).save(folder / "tokenizer")
            alone = sum(pool.map(tokenize_file, tasks[: given.workers], _say_nothing))
        del texts
        started = time.perf_counter()
        with watched_memory() as seen:
            summary = convert(
                [task.path for task in tasks],
                folder / "store",
                tokenizer=str(folder / "tokenizer"),
                store=given.store,
                workers=given.workers,
            )
        seconds = time.perf_counter() - started
    documents = summary["train"]["instances"]
    print(f"tokenizer alone   {alone:>9,.0f} documents/s in {given.workers} processes")
    print(
        f"shard to {given.store:<10}{documents / seconds:>8,.0f} documents/s, {documents / seconds / alone:.0%} of it"
    )
    print(f"memory            {max(seen):>9,} MiB, {documents:,} documents, {summary['train']['tokens']:,} tokens")


def _say_nothing(done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
