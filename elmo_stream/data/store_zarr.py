"""Shards as Zarr v3 groups: one-dimensional arrays, compressed with zstd and guarded by CRC-32C.

An array is one chunk unless it is larger than 64 MiB, since shards are only ever read whole. The CRC is not
optional: zstd alone lets most flipped bits through unnoticed. Zarr reads a chunk file that does not exist as
fill values, so the files are compared with the index before Zarr sees them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from elmo_stream.data.index import Files, ShardEntry
from elmo_stream.data.store import Shard, token_dtype
from elmo_stream.errors import CorruptError
from elmo_stream.files import check_files, list_files, new_folder, sha256_file

_MAX_CHUNK_BYTES = 64 << 20
_ZSTD_LEVEL = 3
_METADATA = "zarr.json"


class ZarrStore:
    """The shards of one store in ``ROOT/SPLIT/shard-NNNNN/``; reading is thread-safe.

    Args:
        root: folder of the store.
        vocab_size: token ids are below it.
        num_labels: label ids are below it.
        weighted: every token has a weight.
    """

    def __init__(self, root: Path, *, vocab_size: int, num_labels: int, weighted: bool) -> None:
        self._root = root
        self._vocab_size = vocab_size
        self._num_labels = num_labels
        self._dtypes: dict[str, np.dtype[Any]] = {
            "tokens": token_dtype(vocab_size),
            "token_offsets": np.dtype(np.int64),
            "labels": np.dtype(np.uint32),
            "label_offsets": np.dtype(np.int64),
        }
        if weighted:
            self._dtypes["token_weights"] = np.dtype(np.float32)

    def write_shard(self, split: str, name: str, shard: Shard) -> ShardEntry:
        """Write a shard durably: its folder appears complete, with one rename. See :class:`ShardStore`."""
        folder = self._root / split / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            group = zarr.create_group(temporary, zarr_format=3)
            for key, dtype in self._dtypes.items():
                values = getattr(shard, key)
                array = group.create_array(
                    key,
                    shape=values.shape,
                    dtype=dtype,
                    chunks=(_chunk_length(len(values), dtype),),
                    compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
                    fill_value=0,
                    config={"write_empty_chunks": True},
                )
                array[:] = values.astype(dtype, copy=False)
        return self._entry(folder)

    def describe_shard(self, split: str, name: str) -> ShardEntry | None:
        """See :class:`ShardStore`."""
        folder = self._root / split / name
        return self._entry(folder) if folder.is_dir() else None

    def read_shard(self, split: str, entry: ShardEntry) -> Shard:
        """See :class:`ShardStore`."""
        folder = self._root / split / entry.name
        lengths = {
            "tokens": entry.tokens,
            "token_offsets": entry.rows + 1,
            "labels": entry.positives,
            "label_offsets": entry.rows + 1,
            "token_weights": entry.tokens,
        }
        lengths = {key: lengths[key] for key in self._dtypes}
        self._check_before_opening(folder, entry.files, lengths)
        try:
            group = zarr.open_group(folder, mode="r", zarr_format=3)
            arrays = {key: self._read_array(folder, group[key], key, length) for key, length in lengths.items()}
        except (OSError, CorruptError):
            raise
        except Exception as error:  # zarr and its codecs raise many kinds for damaged bytes
            check_files(folder, entry.files)
            raise CorruptError(f"{folder}: cannot be decoded ({error}); the shard is damaged.") from error
        shard = Shard(
            tokens=arrays["tokens"],
            token_offsets=arrays["token_offsets"],
            labels=arrays["labels"].astype(np.int64),
            label_offsets=arrays["label_offsets"],
            token_weights=arrays.get("token_weights"),
        )
        self._check_content(folder, shard)
        return shard

    def _entry(self, folder: Path) -> ShardEntry:
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        sizes = {key: _as_array(folder, group[key]).shape[0] for key in self._dtypes}
        return ShardEntry(
            name=folder.name,
            rows=sizes["token_offsets"] - 1,
            tokens=sizes["tokens"],
            positives=sizes["labels"],
            files=list_files(folder),
        )

    def _check_before_opening(self, folder: Path, files: Files, lengths: dict[str, int]) -> None:
        """Everything that bounds what Zarr will allocate, and every file that must be there."""
        expected = {_METADATA} | {f"{key}/{_METADATA}" for key in lengths}
        for key, length in lengths.items():
            chunks = -(-length // _chunk_length(length, self._dtypes[key]))
            expected |= {f"{key}/c/{chunk}" for chunk in range(chunks)}
        if set(files) != expected:
            raise CorruptError(f"{folder}: the index lists other files than a shard of this size has.")
        for name, listed in files.items():
            path = folder / name
            if not path.is_file():
                raise CorruptError(f"{path}: missing, though the index lists it.")
            if path.stat().st_size != listed["bytes"]:
                raise CorruptError(
                    f"{path}: has {path.stat().st_size} bytes where {listed['bytes']} were written; "
                    "the file was cut or altered."
                )
            if path.name == _METADATA and sha256_file(path) != listed["sha256"]:
                raise CorruptError(f"{path}: its checksum differs from the one in the index; the file is damaged.")

    def _read_array(self, folder: Path, node: Any, key: str, length: int) -> NDArray[Any]:
        array, dtype = _as_array(folder, node), self._dtypes[key]
        declared = (array.shape, array.chunks, array.dtype)
        if declared != ((length,), (_chunk_length(length, dtype),), dtype):
            raise CorruptError(f"{folder}/{key}: declares {declared}, which is not {length} values of {dtype}.")
        return np.asarray(array[:])

    def _check_content(self, folder: Path, shard: Shard) -> None:
        for key, values, offsets, least in (
            ("token_offsets", shard.tokens, shard.token_offsets, 1),
            ("label_offsets", shard.labels, shard.label_offsets, 0),
        ):
            if offsets[0] != 0 or offsets[-1] != len(values) or np.any(np.diff(offsets) < least):
                raise CorruptError(f"{folder}/{key}: offsets do not ascend from 0 to {len(values)}.")
        if len(shard.tokens) and int(shard.tokens.max()) >= self._vocab_size:
            raise CorruptError(f"{folder}/tokens: a token id is not below the vocabulary size {self._vocab_size}.")
        if shard.token_weights is not None and not np.isfinite(shard.token_weights).all():
            raise CorruptError(f"{folder}/token_weights: a weight is not finite.")
        if len(shard.labels) and int(shard.labels.max()) >= self._num_labels:
            raise CorruptError(f"{folder}/labels: a label id is not below the number of labels {self._num_labels}.")
        ascends = np.diff(shard.labels) > 0
        inner_starts = shard.label_offsets[1:-1]
        ascends[inner_starts[(inner_starts > 0) & (inner_starts < len(shard.labels))] - 1] = True
        if not ascends.all():
            raise CorruptError(f"{folder}/labels: labels of an instance are not in ascending order.")


def _chunk_length(length: int, dtype: np.dtype[Any]) -> int:
    return max(1, min(length, _MAX_CHUNK_BYTES // dtype.itemsize))


def _as_array(folder: Path, node: Any) -> zarr.Array[Any]:
    if not isinstance(node, zarr.Array) or node.ndim != 1:
        raise CorruptError(f"{folder}: holds something other than one-dimensional arrays.")
    return node
