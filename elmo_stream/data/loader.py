"""Batches streamed from a store: read ahead by threads, in an order that no thread can change, resumed by integers.

The unit of work is a group of ``bucket`` batches. Its rows are read from the shards of one window, sorted by length,
cut into batches, and the batches permuted; all of it is a function of (seed, epoch, group). Groups are prepared in
parallel and handed out in order, so the number of workers and the prefetch depth change nothing but the speed. Threads
suffice, since decompression and NumPy's copies release the interpreter lock.
"""

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.batch import Batch, make_batch
from elmo_stream.data.embeddings import Embeddings
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.order import ShuffledOrder, StoredOrder, batch_permutation
from elmo_stream.data.rows import LabelNameRows, Rows, RowsWithLabelTexts, SplitRows
from elmo_stream.data.store import Shard, concatenate, offsets_of
from elmo_stream.errors import UserError
from elmo_stream.system import return_free_memory
from elmo_stream.threads import DaemonThreads

STATE_VERSION = 1
CLOSE_SECONDS = 10
"""How long readers are waited for at the end; one that hangs then is left to itself."""


class _ShardCache:
    """The shards in use, each read once however many threads ask for it."""

    def __init__(self, read: Callable[[int], Shard]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._shards: dict[int, Future[Shard]] = {}

    def in_reading(self) -> list[int]:
        """The shards that are being read."""
        with self._lock:
            return [shard for shard, future in self._shards.items() if not future.done()]

    def get(self, shard: int) -> Shard:
        with self._lock:
            future = self._shards.get(shard)
            mine = future is None
            if future is None:
                future = self._shards[shard] = Future()
        if mine:
            try:
                future.set_result(self._read(shard))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def keep(self, shards: set[int]) -> None:
        """Forget all other shards."""
        with self._lock:
            gone = self._shards.keys() - shards
            for shard in gone:
                del self._shards[shard]
        if gone:
            return_free_memory()


class StreamLoader:
    """Iterates over batches of one split, epoch after epoch (``shuffle``) or once in the order of the store.

    Args:
        store: folder of the store.
        rows: first and last (exclusive) row of the split to use; validation takes the end of the training split.
        block_labels: labels per block of the pointer array of the positives.
        embeddings: of the instances, which the batches then carry.
        label_texts: go over the labels' names too, each with its own label; for training from the first row on.

    Raises:
        UserError: the split is absent or empty.
        CorruptError: a shard is damaged; names it.
        TimeoutError: no batch came within ``config.timeout`` seconds; names the shard that is waited for.
    """

    def __init__(
        self,
        store: Path,
        *,
        split: str = "train",
        rows: tuple[int, int] | None = None,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        block_labels: int,
        config: LoaderConfig,
        label_texts: bool = False,
        embeddings: Embeddings | None = None,
    ) -> None:
        self._index = StoreIndex.load(store)
        if split not in self._index.splits:
            raise UserError(f"{store}: has no split {split!r}; it has {', '.join(self._index.splits)}.")
        self._first, last = rows or (0, self._index.splits[split].instances)
        if last <= self._first:
            raise UserError(f"{store}: no instances to read in split {split!r}.")
        self._rows: Rows = SplitRows(store, self._index, split, last)
        if label_texts:
            self._rows = RowsWithLabelTexts(self._rows, LabelNameRows(store, seed=seed))
        self._batch, self._seed, self._shuffle, self._config = batch, seed, shuffle, config
        self._block_labels, self.embeddings = block_labels, embeddings
        self._shard_start = offsets_of(self._rows.sizes)
        self._last = int(self._shard_start[-1])
        self._cache = _ShardCache(self._rows.read)
        self._epoch, self._seen = 0, 0
        self._iterating = False
        self._pool = DaemonThreads(config.workers, "elmo-loader") if config.workers else None
        self._closed = self._stalled = False
        self._place, self._split = store, split

    @property
    def instances(self) -> int:
        """Instances per epoch."""
        return self._last - self._first

    @property
    def batches_per_epoch(self) -> int:
        """Steps per epoch; the last batch may be short."""
        return -(-self.instances // self._batch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch handed out last: plain integers and the store's fingerprint."""
        return {
            "version": STATE_VERSION,
            "store": self._index.fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "instances_seen": self._seen,
            "instances": self.instances,
            "batch": self._batch,
            "bucket": self._config.bucket,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next batch is the one that would have come.

        Raises:
            UserError: the state belongs to another store, seed, batch size or grouping, or iteration has begun.
        """
        if self._iterating:
            raise UserError("The loader is already in use; load its state before the first batch.")
        mine = self.state_dict()
        for key in ("version", "store", "seed", "instances", "batch", "bucket"):
            if state.get(key) != mine[key]:
                raise UserError(
                    f"The checkpoint was made with loader {key} = {state.get(key)!r}, this run has "
                    f"{mine[key]!r}; resume with the store and configuration it was trained with."
                )
        self._epoch, self._seen = int(state["epoch"]), int(state["instances_seen"])

    def go_to(self, batches: int) -> None:
        """Go to the position behind as many batches, counted from the beginning of the first epoch."""
        if self._iterating:
            raise UserError("The loader is already in use; choose its position before the first batch.")
        self._epoch, done = divmod(batches, self.batches_per_epoch)
        self._seen = done * self._batch

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on; endless when shuffled."""
        if self._closed:
            raise ValueError("the loader is closed")
        self._iterating = True
        skip = self._seen // self._batch % self._config.bucket
        for epoch, group, batches in self._groups_in_order():
            for number, batch in enumerate(batches):
                if skip:
                    skip -= 1
                    continue
                done = (group * self._config.bucket + number + 1) * self._batch
                self._epoch, self._seen = (epoch, done) if done < self.instances else (epoch + 1, 0)
                yield batch

    def _groups_in_order(self) -> Iterator[tuple[int, int, list[Batch]]]:
        plan = self._plan_groups()
        if self._pool is None:
            for epoch, group, order in plan:
                self._cache.keep(self._shards_of(group, order))
                yield epoch, group, self._build_group(epoch, group, order)
            return
        ahead: deque[tuple[int, int, set[int], Future[list[Batch]]]] = deque()

        def oldest() -> tuple[int, int, list[Batch]]:
            # Groups are begun in order, so no thread is at work on one before these.
            self._cache.keep(set().union(*(shards for _, _, shards, _ in ahead)))
            epoch, group, _, future = ahead.popleft()
            return epoch, group, self._wait(future)

        try:
            for epoch, group, order in plan:
                future = self._pool.submit(partial(self._build_group, epoch, group, order))
                ahead.append((epoch, group, self._shards_of(group, order), future))
                if len(ahead) > self._config.prefetch:
                    yield oldest()
            while ahead:
                yield oldest()
        finally:
            for *_, future in ahead:
                future.cancel()

    def _wait(self, future: "Future[list[Batch]]") -> list[Batch]:
        try:
            return future.result(self._config.timeout or None)
        except TimeoutError as error:
            if future.done():  # at the last moment, or the reading itself raised it
                return future.result()
            self._stalled = True
            entries = self._index.splits[self._split].shards
            shards = ", ".join(entries[number].name for number in self._cache.in_reading()) or "no shard"
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"no batch within {self._config.timeout:g} seconds (loader.timeout), while {shards} of split "
                f"{self._split!r} is being read; see whether its disk or server is alive, then resume.",
                str(self._place),
            ) from error

    def _plan_groups(self) -> Iterator[tuple[int, int, ShuffledOrder | StoredOrder]]:
        epoch, group = self._epoch, self._seen // self._batch // self._config.bucket
        groups = -(-self.batches_per_epoch // self._config.bucket)
        while True:
            order = self._order(epoch)
            for number in range(group, groups):
                yield epoch, number, order
            if not self._shuffle:
                return
            epoch, group = epoch + 1, 0

    def _order(self, epoch: int) -> ShuffledOrder | StoredOrder:
        if not self._shuffle:
            return StoredOrder(self._rows.sizes.tolist(), self._first, self._last)
        if self._first:
            raise ValueError("a shuffled loader starts at the first row of its split")
        return ShuffledOrder(self._rows.sizes.tolist(), seed=self._seed, epoch=epoch)

    def _shards_of(self, group: int, order: ShuffledOrder | StoredOrder) -> set[int]:
        size = self._batch * self._config.bucket
        return order.shards(group * size, (group + 1) * size)

    def _build_group(self, epoch: int, group: int, order: ShuffledOrder | StoredOrder) -> list[Batch]:
        size = self._batch * self._config.bucket
        ids = order.ids(group * size, (group + 1) * size)
        rows, instances = self._read_rows(ids), self._rows.instances(ids)
        embedding_ND = self.embeddings.take(instances) if self.embeddings else None
        by_length = np.arange(len(ids))
        if self._config.bucket > 1:
            by_length = np.argsort(np.diff(rows.token_offsets), kind="stable")
        pieces = [by_length[start : start + self._batch] for start in range(0, len(ids), self._batch)]
        # A short batch stays last, so that a position is a number of whole batches.
        whole = len(ids) // self._batch
        if self._shuffle:
            turn = batch_permutation(whole, seed=self._seed, epoch=epoch, group=group)
            pieces = [pieces[i] for i in turn] + pieces[whole:]
        return [
            make_batch(
                rows.take(piece),
                instances[piece],
                pad_id=self._index.tokenizer.pad_id,
                num_labels=self._index.labels.count,
                block_labels=self._block_labels,
                embedding_BD=None if embedding_ND is None else embedding_ND[torch.from_numpy(piece)],
            )
            for piece in pieces
        ]

    def _read_rows(self, ids: np.ndarray) -> Shard:
        shard_of = np.searchsorted(self._shard_start, ids, side="right") - 1
        parts, places = [], []
        for number in np.unique(shard_of):
            place = np.flatnonzero(shard_of == number)
            parts.append(self._cache.get(int(number)).take(ids[place] - self._shard_start[number]))
            places.append(place)
        return concatenate(parts).take(np.argsort(np.concatenate(places), kind="stable"))

    def close(self) -> None:
        """End the background threads; a second call does nothing."""
        self._closed = True
        if self._pool is not None:
            self._pool.close(seconds=0 if self._stalled else CLOSE_SECONDS)

    def __enter__(self) -> "StreamLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
