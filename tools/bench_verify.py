"""Bytes a second of ``elmo-stream verify``, beside ``sha256sum`` and Python's hashlib and zlib over the same files.

    python -m tools.bench_verify [--gib 2] [--store zarr]

The store holds random token ids, which do not compress. Everything is read once before, so that the page cache is warm
and the disk plays no part; ``verify`` checks sizes and SHA-256 of every file with one thread a CPU, the others do less:
``sha256sum`` and hashlib do not know what the sums should be, and CRC-32 finds no forgery.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from elmo_stream.data.index import BACKENDS
from elmo_stream.inspection import verify
from elmo_stream.system import available_cpus
from tools.synthetic import synthetic_store

TOKENS, LABELS = 128, 100_000
_ROW_BYTES = 2 * TOKENS
_PIECE = 1 << 20


def with_sha256sum(files: list[Path]) -> None:
    """The program of coreutils, one process over all files."""
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def with_sha256sum_by_cpus(files: list[Path]) -> None:
    """As many processes of ``sha256sum`` as CPUs, by xargs."""
    command = ["xargs", "-0", "-n1", f"-P{available_cpus()}", "sha256sum"]
    subprocess.run(command, input="\0".join(map(str, files)).encode(), check=True, stdout=subprocess.DEVNULL)


def with_hashlib(files: list[Path]) -> None:
    """``hashlib.sha256`` in one thread."""
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)


def with_crc32(files: list[Path]) -> None:
    """``zlib.crc32`` with one thread a CPU."""

    def check(path: Path) -> None:
        checksum = 0
        with open(path, "rb") as stream:
            while piece := stream.read(_PIECE):
                checksum = zlib.crc32(piece, checksum)

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(check, files))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of the seconds of a call."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--store", choices=BACKENDS, default="zarr")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        store = Path(folder) / "store"
        synthetic_store(store, options.store, int(options.gib * 2**30) // _ROW_BYTES, TOKENS, LABELS, uniform=True)
        files = sorted(path for path in store.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        with_crc32(files)
        print(f"{size / 2**30:.2f} GiB in {len(files)} files, {available_cpus()} CPUs, page cache warm")
        ways: dict[str, Callable[[], object]] = {
            "elmo-stream verify": partial(verify, store),
            "sha256sum, one process": partial(with_sha256sum, files),
            "sha256sum, a process a CPU": partial(with_sha256sum_by_cpus, files),
            "hashlib.sha256, one thread": partial(with_hashlib, files),
            "zlib.crc32, a thread a CPU": partial(with_crc32, files),
        }
        for name, work in ways.items():
            print(f"{name:<28}{size / 1e6 / seconds(work, options.repeats):>8,.0f} MB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
