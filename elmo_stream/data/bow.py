"""Bags of features in the place of tokens: feature ``i`` is token ``i``, and every token has a weight."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.index import BOW
from elmo_stream.data.readers.instance import Features
from elmo_stream.data.readers.sparse import MAX_COLUMNS
from elmo_stream.data.store import offsets_of, token_dtype
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import read_json, write_bytes_durably, write_json_durably

MAX_FEATURES = min(MAX_COLUMNS, 1 << 28)


class BagOfFeatures:
    """Sparse vectors to token ids with weights; has the face of a :class:`elmo_stream.data.tokenize.Tokenizer`.

    The id behind the last feature stands for a vector without entries, and for padding.

    Args:
        features: number of features of the input.
        max_length: most features of an instance that are kept; those of the largest weights stay.

    Raises:
        UserError: more features than embeddings can be made for.
    """

    kind = source = BOW

    def __init__(self, features: int, max_length: int) -> None:
        if not 0 < features <= MAX_FEATURES:
            raise UserError(f"the input has {features:,} features; from 1 to {MAX_FEATURES:,} are possible.")
        self.pad_id = features
        self.vocab_size = features + 1
        self.max_length = max_length
        self._json = json.dumps({"kind": BOW, "features": features}).encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``tokenizer.json``; equal fingerprints give equal ids."""
        return hashlib.sha256(self._json).hexdigest()

    def encode_features(
        self, rows: Sequence[Features]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.float32], int]:
        """Token ids of all rows, offsets (int64, rows + 1), weights, and how many rows were cut to ``max_length``.

        Raises:
            UserError: a row has a feature that the training data did not have.
        """
        ids, weights, cut = [], [], 0
        for row in rows:
            id_N, weight_N = row.id_N, row.weight_N
            if len(id_N) > self.max_length:
                kept = np.sort(np.argsort(-np.abs(weight_N), kind="stable")[: self.max_length])
                id_N, weight_N, cut = id_N[kept], weight_N[kept], cut + 1
            if len(id_N) and id_N[-1] >= self.pad_id:
                raise UserError(f"a row has feature {id_N[-1]}, but the training data have {self.pad_id} features.")
            ids.append(id_N if len(id_N) else np.array([self.pad_id]))
            weights.append(weight_N if len(id_N) else np.ones(1, np.float32))
        flat = np.concatenate([np.empty(0, np.int64), *ids]).astype(token_dtype(self.vocab_size))
        return flat, offsets_of([len(row) for row in ids]), np.concatenate([np.empty(0, np.float32), *weights]), cut

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into an existing folder."""
        config = {"kind": BOW, "max_length": self.max_length, "pad_id": self.pad_id, "vocab_size": self.vocab_size}
        write_bytes_durably(folder / "tokenizer.json", self._json)
        write_json_durably(folder / "tokenizer_config.json", config | {"source": BOW})

    @classmethod
    def load(cls, folder: Path) -> "BagOfFeatures":
        """Load what :meth:`save` wrote.

        Raises:
            CorruptError: a file is damaged.
        """
        path = folder / "tokenizer_config.json"
        try:
            features = int(read_json(folder / "tokenizer.json")["features"])
            config = read_json(path)
            loaded = cls(features, int(config["max_length"]))
            matches = (loaded.pad_id, loaded.vocab_size) == (config["pad_id"], config["vocab_size"])
        except (KeyError, TypeError, ValueError, UserError, FileNotFoundError) as error:
            raise CorruptError(f"{path}: a value is missing or odd ({error}); it is damaged.") from error
        if not matches:
            raise CorruptError(f"{path}: describes another number of features than tokenizer.json.")
        return loaded


def is_bow(folder: Path) -> bool:
    """Whether a ``tokenizer`` folder is of features.

    Raises:
        CorruptError: the folder is damaged.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise CorruptError(f"{path}: missing, though it belongs to the tokenizer.")
    config = read_json(path)
    return isinstance(config, dict) and config.get("kind") == BOW
