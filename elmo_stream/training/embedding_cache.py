"""The embeddings of a frozen encoder: computed once for everything that a run trains and validates on.

A cache belongs to the content of a store and to an encoder: its folder is named by the fingerprints of both, so that
many runs may share one, and none reads that of another.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elmo_stream.data.batch import pad, pad_weights
from elmo_stream.data.embeddings import EMBEDDING_BYTES, INDEX_NAME, EmbeddingPart, Embeddings, write_part
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.rows import LabelNameRows, Rows, SplitRows
from elmo_stream.data.store import Shard
from elmo_stream.files import locked, require_space
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.run import Run
from elmo_stream.training.runlog import LINE_SECONDS, Report

CACHED_AT_ONCE = 256


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings for the loader of the training, and for that of the validation, where there is one."""

    training: Embeddings
    validation: Embeddings


def open_embedding_cache(
    run: Run, store: Path, index: StoreIndex, encoder: Encoder, device: torch.device, report: Report
) -> EmbeddingCache:
    """The cache of a run, made if it is not there, in ``encoder.cache`` or in the run's folder.

    Raises:
        LockedError: another process is making it.
        CorruptError: it, or a shard of the store, is damaged.
    """
    config, info = run.config, run.info
    root = Path(config.encoder.cache or run.path / "embeddings") / _fingerprint(index, encoder)
    maker = _Maker(root, encoder, index, device, report)
    train = maker.part("train", SplitRows(store, index, "train", index.splits["train"].instances))
    valid, names = train, None
    if "valid" in index.splits:
        count = info.validation_instances
        valid = maker.part(f"valid-{count}", SplitRows(store, index, "valid", count))
    if config.train.label_texts:
        names = maker.part(f"names-{config.seed}", LabelNameRows(store, seed=config.seed))
    return EmbeddingCache(Embeddings(train, names, info.instances), Embeddings(valid, None, 0))


def _fingerprint(index: StoreIndex, encoder: Encoder) -> str:
    digest = hashlib.sha256(json.dumps([index.fingerprint, encoder.body.describe()]).encode())
    for name, tensor in sorted(encoder.body.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


class _Maker:
    def __init__(self, root: Path, encoder: Encoder, index: StoreIndex, device: torch.device, report: Report) -> None:
        self._root, self._encoder, self._device, self._report = root, encoder, device, report
        self._pad_id = index.tokenizer.pad_id
        self._said = time.monotonic()

    def part(self, name: str, rows: Rows) -> EmbeddingPart:
        folder, total = self._root / name, int(rows.sizes.sum())

        def progress(done: int) -> None:
            if time.monotonic() - self._said >= LINE_SECONDS:
                self._said = time.monotonic()
                self._report(f"embedding {name}: {done:,} of {total:,}")

        if not (folder / INDEX_NAME).is_file():
            self._report(f"embedding {name}: {total:,} texts, once, into {folder}")
            with locked(folder):
                kept = sum(path.stat().st_size for path in folder.iterdir())
                require_space(folder, max(0, EMBEDDING_BYTES * total * self._encoder.dim - kept))
                write_part(folder, rows, self._embed, self._encoder.dim, progress)
        return EmbeddingPart(folder, rows, self._encoder.dim)

    def _embed(self, shard: Shard) -> Tensor:
        """x_ND float32 of rows; texts of like length are embedded together."""
        by_length = np.argsort(np.diff(shard.token_offsets), kind="stable")
        x_ND = torch.empty(shard.rows, self._encoder.dim)
        for first in range(0, shard.rows, CACHED_AT_ONCE):
            place = by_length[first : first + CACHED_AT_ONCE]
            rows = shard.take(place)
            token_ids_BT, mask_BT = pad(rows.tokens, rows.token_offsets, self._pad_id)
            weight_BT = None
            if rows.token_weights is not None:
                weight_BT = pad_weights(rows.token_weights, mask_BT).to(self._device)
            with torch.no_grad():
                x_BD = self._encoder.embed(token_ids_BT.to(self._device), mask_BT.to(self._device), weight_BT)
            x_ND[torch.from_numpy(place)] = x_BD.cpu()
        return x_ND
