"""The index of a store: one JSON file, written last, so that a store exists exactly when its index exists.

``STORE/index.json`` holds what a reader must know before it opens anything else: sizes to check every
declared shape against, checksums of every file, and the fingerprints by which a run recognises its store and
its tokenizer.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import Readable, check_folders, read_json, write_json_durably

FORMAT = "elmo-stream-store"
VERSION = 2
INDEX_NAME = "index.json"
BUILD_NAME = ".build"
FILTERS = "filters"
BOW = "bow"  # the kind of tokenizer whose tokens are features with weights
SPLITS = ("train", "test", "valid")
BACKENDS = ("zarr", "webdataset")
MAX_LABELS = 2**32 - 2
MAX_LENGTH = 1 << 16  # tokens or features of an instance
MAX_ROWS_PER_SHARD = 1 << 24
_NPY_ROOM = 1 << 12  # for the header of a file of NumPy
_SHARD_NAME = re.compile(r"shard-\d{5,}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Files = dict[str, dict[str, Any]]
"""Relative POSIX path -> ``{"bytes": int, "sha256": hex}``, as :func:`elmo_stream.files.list_files` makes it.
"""


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer made the token ids; ``fingerprint`` is the SHA-256 of its ``tokenizer.json``."""

    kind: str
    source: str
    fingerprint: str
    vocab_size: int
    pad_id: int
    max_length: int
    files: Files


@dataclass(frozen=True)
class LabelsEntry:
    """The label map of the training split: ``count`` labels, ids 0 to ``count - 1`` by falling frequency."""

    count: int
    files: Files


@dataclass(frozen=True)
class Propensity:
    """A and B of the propensity model (Jain et al., KDD 2016): 0.55, 1.5 unless the data set has its own."""

    A: float
    B: float


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its folder's name, its sizes, and its files."""

    name: str
    rows: int
    tokens: int
    positives: int
    files: Files


@dataclass(frozen=True)
class SplitEntry:
    """One split: totals over its shards, and what the conversion cut, dropped or merged.

    ``unseen_labels`` and ``duplicate_labels`` count occurrences: labels that the training split does not
    have, and repeated labels within an instance.
    """

    instances: int
    tokens: int
    positives: int
    truncated: int
    dropped: dict[str, int]
    unseen_labels: int
    duplicate_labels: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class StoreIndex:
    """Everything known about a store; immutable once written.

    ``filters`` lists the files of pairs that no ranking may hold, ``SPLIT.npy`` in ``filters/``.
    """

    backend: str
    seed: int
    rows_per_shard: int
    tokenizer: TokenizerEntry
    labels: LabelsEntry
    propensity: Propensity
    splits: dict[str, SplitEntry]
    filters: Files

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the index, and so, through its checksums, over the content of the store."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def load(cls, store: Path) -> "StoreIndex":
        """Read and validate ``STORE/index.json``.

        Raises:
            UserError: the folder is no store, is an unfinished conversion, or was written by another version.
            CorruptError: the index is damaged.
        """
        path = store / INDEX_NAME
        if not path.is_file():
            raise UserError(_why_no_index(store))
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CorruptError(f"{path}: is not the index of an elmo-stream store ('format' is not '{FORMAT}').")
        if value.get("version") != VERSION:
            raise UserError(
                f"{path}: store version {value.get('version')!r} is not {VERSION}, which this elmo-stream "
                "reads; convert the data again, or install the version that wrote the store."
            )
        body = {key: item for key, item in value.items() if key not in ("format", "version", "fingerprint")}
        index: StoreIndex = decode(cls, body, str(path))
        if index.fingerprint != value.get("fingerprint"):
            raise CorruptError(f"{path}: its content does not match its fingerprint; the index was altered or damaged.")
        index._check_consistency(path)
        return index

    def save(self, store: Path) -> None:
        """Write ``STORE/index.json`` durably; from then on the store exists."""
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        write_json_durably(store / INDEX_NAME, head | asdict(self))

    def verify(self, store: Path, shards: Readable | None = None) -> None:
        """Read every file of the store and compare sizes and SHA-256; ``shards`` tells where they are, if elsewhere.

        Raises:
            CorruptError: naming the first file that is missing, cut or altered.
        """
        root = shards or store
        check_folders(
            [
                (store / "labels", self.labels.files),
                (store / "tokenizer", self.tokenizer.files),
                (store / FILTERS, self.filters),
                *(
                    (root / split / shard.name, shard.files)
                    for split, each in self.splits.items()
                    for shard in each.shards
                ),
            ]
        )

    def _check_consistency(self, path: Path) -> None:
        if self.backend not in BACKENDS:
            raise CorruptError(f"{path}: backend {self.backend!r:.60} is not one of {', '.join(BACKENDS)}.")
        if not 0 < self.labels.count <= MAX_LABELS:
            raise CorruptError(f"{path}: labels.count {self.labels.count} is not in 1...{MAX_LABELS}.")
        offsets = self.labels.files.get("offsets.npy")
        if offsets is not None and not 8 * self.labels.count < offsets["bytes"] <= 8 * self.labels.count + _NPY_ROOM:
            raise CorruptError(f"{path}: labels.count {self.labels.count} does not fit the size of labels/offsets.npy.")
        if "train" not in self.splits or not set(self.splits) <= set(SPLITS):
            raise CorruptError(f"{path}: splits are {sorted(self.splits)}; expected train and perhaps test and valid.")
        for name, split in self.splits.items():
            shards = split.shards
            for shard in shards:
                if not _SHARD_NAME.fullmatch(shard.name):
                    raise CorruptError(f"{path}: splits.{name}: {shard.name!r} is not a shard's name.")
                if shard.rows == 0:
                    raise CorruptError(f"{path}: splits.{name}: {shard.name} has no rows, as no shard has.")
            sums = tuple(sum(getattr(shard, key) for shard in shards) for key in ("rows", "tokens", "positives"))
            if sums != (split.instances, split.tokens, split.positives) or split.instances == 0:
                raise CorruptError(
                    f"{path}: splits.{name}: the sizes of the shards do not add up to those of the split."
                )


def _why_no_index(store: Path) -> str:
    if not store.is_dir():
        return f"{store}: no such folder; make a store with `elmo-stream shard TRAIN.jsonl --out {store}`."
    if (store / BUILD_NAME).is_dir():
        return f"{store}: an unfinished conversion; run the same `elmo-stream shard` again to finish it."
    return f"{store}: not a store (no {INDEX_NAME}); make one with `elmo-stream shard TRAIN.jsonl --out FOLDER`."


def decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild ``kind`` (dataclass, dict, tuple, or scalar) from JSON, refusing whatever is odd."""
    if kind == Files:
        return _files(value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        expected = {field.name for field in fields(kind)}
        if not isinstance(value, dict) or set(value) != expected:
            raise CorruptError(f"{where}: expected exactly the keys {sorted(expected)}.")
        return kind(**{key: decode(hints[key], value[key], f"{where}: {key}") for key in value})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is int and type(value) is int and 0 <= value < 2**63:
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    raise CorruptError(f"{where}: {value!r:.60} is not a valid {_name(kind)}.")


def _name(kind: Any) -> str:
    return "count" if kind is int else getattr(kind, "__name__", str(kind))


def _files(value: Any, where: str) -> Files:
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: expected a table of files.")
    for name, entry in value.items():
        if not _FILE_NAME.fullmatch(name):
            raise CorruptError(f"{where}: {name!r} is not the name of a file of a store.")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CorruptError(f"{where}.{name}: expected bytes and sha256.")
        if type(entry["bytes"]) is not int or entry["bytes"] < 0 or not _SHA256.fullmatch(str(entry["sha256"])):
            raise CorruptError(f"{where}.{name}: not a valid size and checksum.")
    return value
