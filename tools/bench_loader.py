"""Finished batches a second of the loader, beside the usual ways: NumPy's memmap and zarr-python read row by row.

    python -m tools.bench_loader [--store webdataset] [--documents 20000000]

A batch is finished when its token ids are padded tensors and its positives sorted, with a pointer per block of labels.
Every way runs in a process of its own and assembles batches with the same code; its memory is what that process holds.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from elmo_stream.config import LoaderConfig
from elmo_stream.data.batch import Batch, make_batch
from elmo_stream.data.index import BACKENDS, StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.store import Shard, offsets_of, open_store
from elmo_stream.system import available_cpus, peak_resident_bytes, resident_bytes
from tools.synthetic import synthetic_store

BLOCK_LABELS = 1024
CHUNK_ROWS = 1024
SECONDS = 15.0
WARM_UP = 64


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    folder: Path
    tokens: int
    labels: int
    batch: int
    workers: int


def through_loader(setting: Setting) -> Iterator[Batch]:
    """The loader, shuffled."""
    config = LoaderConfig(workers=setting.workers, prefetch=2 * setting.workers)
    store = setting.folder / "store"
    with StreamLoader(store, batch=setting.batch, block_labels=BLOCK_LABELS, config=config) as loader:
        yield from loader


def through_memmap(setting: Setting) -> Iterator[Batch]:
    """Rows at random from uncompressed files that NumPy maps."""
    tokens = np.load(setting.folder / "tokens.npy", mmap_mode="r")
    yield from _row_by_row(setting, tokens, len(tokens), in_order=False)


def through_zarr(setting: Setting) -> Iterator[Batch]:
    """Rows at random from a compressed array, as zarr-python reads them."""
    yield from _through_zarr(setting, in_order=False)


def through_zarr_in_order(setting: Setting) -> Iterator[Batch]:
    """Rows in stored order from a compressed array, as zarr-python reads them."""
    yield from _through_zarr(setting, in_order=True)


WAYS: dict[str, Callable[[Setting], Iterator[Batch]]] = {
    "elmo-stream, shuffled": through_loader,
    "numpy memmap, shuffled": through_memmap,
    "zarr-python, shuffled": through_zarr,
    "zarr-python, in order": through_zarr_in_order,
}


def _through_zarr(setting: Setting, in_order: bool) -> Iterator[Batch]:
    import zarr

    array = zarr.open_array(setting.folder / "tokens.zarr", mode="r")
    yield from _row_by_row(setting, array.oindex, array.shape[0], in_order)


def _row_by_row(setting: Setting, tokens: Any, rows: int, in_order: bool) -> Iterator[Batch]:
    labels, offsets = (np.load(setting.folder / f"{name}.npy", mmap_mode="r") for name in ("labels", "label_offsets"))
    chance = np.random.default_rng(0)
    while True:
        order = np.arange(rows) if in_order else chance.permutation(rows)
        for first in range(0, rows - setting.batch + 1, setting.batch):
            chosen = np.sort(order[first : first + setting.batch])
            read = np.asarray(tokens[chosen])
            pieces = [labels[offsets[row] : offsets[row + 1]] for row in chosen]
            shard = Shard(
                tokens=read.ravel(),
                token_offsets=offsets_of(np.full(len(chosen), setting.tokens)),
                labels=np.concatenate(pieces).astype(np.int64),
                label_offsets=offsets_of([len(piece) for piece in pieces]),
            )
            yield make_batch(shard, chosen, pad_id=0, num_labels=setting.labels, block_labels=BLOCK_LABELS)


def prepare(setting: Setting, backend: str, documents: int) -> None:
    """Write the store, and its first shards once more in the forms that the other ways read."""
    import zarr

    store = setting.folder / "store"
    synthetic_store(store, backend, documents, setting.tokens, setting.labels)
    entries = StoreIndex.load(store).splits["train"].shards[:16]
    shards = [open_store(store).read_shard("train", entry) for entry in entries]
    tokens = np.concatenate([shard.tokens for shard in shards]).reshape(-1, setting.tokens)
    np.save(setting.folder / "tokens.npy", tokens)
    np.save(setting.folder / "labels.npy", np.concatenate([shard.labels for shard in shards]).astype(np.uint32))
    counts = np.concatenate([np.diff(shard.label_offsets) for shard in shards])
    np.save(setting.folder / "label_offsets.npy", offsets_of(counts))
    chunks = (CHUNK_ROWS, setting.tokens)
    array = zarr.create_array(setting.folder / "tokens.zarr", shape=tokens.shape, chunks=chunks, dtype=tokens.dtype)
    array[:] = tokens


def measure(way: str, setting: Setting, documents: int | None) -> dict[str, Any]:
    """Read ``documents``, or for 15 seconds, after a warm-up."""
    import torch

    torch.set_num_threads(1)
    batches = WAYS[way](setting)
    for batch in islice(batches, WARM_UP):
        del batch
    seen = 0
    resident: list[int] = []
    started = time.perf_counter()
    while (seen < documents) if documents else (time.perf_counter() - started < SECONDS):
        seen += len(next(batches).instance_B)
        if documents and seen * 10 // documents > len(resident):
            resident.append(resident_bytes() >> 20)
    seconds = time.perf_counter() - started
    return {
        "way": way,
        "documents": seen,
        "batches_per_second": seen / setting.batch / seconds,
        "documents_per_second": seen / seconds,
        "peak_rss_mib": peak_resident_bytes() >> 20,
        "rss_mib_by_tenth": resident,
    }


def main() -> None:
    """Parse, prepare, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", choices=BACKENDS, default="zarr")
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=available_cpus())
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        setting = Setting(Path(folder), given.tokens, given.labels, given.batch, given.workers)
        prepare(setting, given.store, given.documents)
        context = multiprocessing.get_context("spawn")
        for way in WAYS:
            documents = given.documents if way.startswith("elmo-stream") else None
            with context.Pool(1) as pool:
                result = pool.apply(measure, (way, setting, documents))
            print(json.dumps(result) if given.json else _line(result), flush=True)


def _line(result: dict[str, Any]) -> str:
    tenths = f"  by tenth {result['rss_mib_by_tenth']}" if result["rss_mib_by_tenth"] else ""
    return (
        f"{result['way']:<24} {result['batches_per_second']:>8,.0f} batches/s {result['documents_per_second']:>9,.0f} "
        f"documents/s   RSS {result['peak_rss_mib']:,.0f} MiB{tenths}"
    )


if __name__ == "__main__":
    main()
