"""Embeddings of rows on disk: computed once where the encoder does not change, then read like anything else.

A part is a folder of files, one a shard, of bfloat16 values without a header, and ``index.json``, written last, with
sizes and checksums. Files are mapped, and each is compared with its checksum when it is first used.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_stream.data.rows import Rows
from elmo_stream.data.store import Shard, offsets_of
from elmo_stream.errors import CorruptError
from elmo_stream.files import check_files, list_files, new_file, read_sealed_json, write_sealed_json

FORMAT, VERSIONS = "elmo-stream-embeddings", (1, 2)
INDEX_NAME = "index.json"
_KEYS = {"format", "version", "dim", "rows", "files"}
_ROWS_AT_ONCE = 4096
EMBEDDING_BYTES = 2  # a feature


def write_part(
    folder: Path, rows: Rows, embed: Callable[[Shard], Tensor], dim: int, progress: Callable[[int], None]
) -> None:
    """Compute the embeddings of all rows in use; a file that an earlier call finished is kept.

    Args:
        embed: from rows to their embeddings, float32 (N, D) on the CPU.
        dim: features of an embedding.
        progress: called with the number of rows done so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for number, size in enumerate(rows.sizes.tolist()):
        path = folder / _file_name(number)
        if path.is_file() and path.stat().st_size == EMBEDDING_BYTES * size * dim:
            done += size
            continue
        shard = rows.read(number)
        with new_file(path) as stream:
            for first in range(0, size, _ROWS_AT_ONCE):
                piece = shard.rows_between(first, min(first + _ROWS_AT_ONCE, size))
                stream.write(embed(piece).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes())
                done += piece.rows
                progress(done)
    files = {name: entry for name, entry in list_files(folder).items() if name.endswith(".bf16")}
    body = {"format": FORMAT, "version": VERSIONS[-1], "dim": dim, "rows": rows.sizes.tolist(), "files": files}
    write_sealed_json(folder / INDEX_NAME, body)


def _file_name(number: int) -> str:
    return f"shard-{number:05d}.bf16"


def verify_part(folder: Path) -> None:
    """Compare the files of a part with its index; raises ``CorruptError`` that names the one that is damaged."""
    check_files(folder, _read_index(folder)["files"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    index = read_sealed_json(path, first_had_none=True)
    known = set(index) == _KEYS and index["format"] == FORMAT and index["version"] in VERSIONS
    if not known or not isinstance(index["files"], dict):
        raise CorruptError(f"{path}: damaged, or of another version; remove {folder}.")
    return index


class EmbeddingPart:
    """The embeddings of a part by row; may be read by several threads.

    Raises:
        CorruptError: the index is damaged, or belongs to other rows.
    """

    def __init__(self, folder: Path, rows: Rows, dim: int) -> None:
        index = _read_index(folder)
        names = [_file_name(number) for number in range(len(rows.sizes))]
        if (index["dim"], index["rows"], sorted(index["files"])) != (dim, rows.sizes.tolist(), names):
            raise CorruptError(f"{folder / INDEX_NAME}: belongs to other texts; remove {folder}.")
        self._folder, self._files, self._dim = folder, index["files"], dim
        self._start = offsets_of(rows.sizes)
        self._mapped: dict[int, NDArray[np.int16]] = {}
        self._lock = threading.Lock()

    def take(self, row_N: NDArray[np.int64]) -> Tensor:
        """bfloat16 (N, D) embeddings of rows.

        Raises:
            CorruptError: a file is missing, cut or altered; names it.
        """
        shard_N = np.searchsorted(self._start, row_N, side="right") - 1
        taken = np.empty((len(row_N), self._dim), dtype=np.int16)
        for shard in np.unique(shard_N):
            place = np.flatnonzero(shard_N == shard)
            taken[place] = self._matrix(int(shard))[row_N[place] - self._start[shard]]
        return torch.from_numpy(taken).view(torch.bfloat16)

    def _matrix(self, shard: int) -> NDArray[np.int16]:
        with self._lock:
            if shard not in self._mapped:
                name = _file_name(shard)
                check_files(self._folder, {name: self._files[name]})
                shape = (int(self._start[shard + 1] - self._start[shard]), self._dim)
                if self._files[name]["bytes"] != EMBEDDING_BYTES * shape[0] * shape[1]:
                    raise CorruptError(f"{self._folder / INDEX_NAME}: damaged; remove {self._folder}.")
                self._mapped[shard] = np.memmap(self._folder / name, dtype="<i2", mode="r", shape=shape)
            return self._mapped[shard]


class Embeddings:
    """The embeddings of the instances of a loader: rows of a split, and behind them the labels' names."""

    def __init__(self, rows: EmbeddingPart, names: EmbeddingPart | None, names_from: int) -> None:
        self._rows, self._names, self._names_from = rows, names, names_from

    def take(self, instance_B: NDArray[np.int64]) -> Tensor:
        """bfloat16 (B, D) embeddings of instances as ``Batch.instance_B`` numbers them."""
        if self._names is None:
            return self._rows.take(instance_B)
        is_name = instance_B >= self._names_from
        rows, names = self._rows.take(instance_B[~is_name]), self._names.take(instance_B[is_name] - self._names_from)
        place = np.argsort(np.concatenate([np.flatnonzero(~is_name), np.flatnonzero(is_name)]))
        return torch.cat([rows, names])[torch.from_numpy(place)]
