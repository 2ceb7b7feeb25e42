"""The data of ``bench_formats``: fixed embeddings of documents, and their labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from torch import Tensor

HASH_FEATURES = 1 << 16
PROPENSITY_A, PROPENSITY_B = 0.55, 1.5


@dataclass(frozen=True)
class Dataset:
    """Embeddings of unit mean square, and label ids in the order of falling training frequency."""

    train_ND: Tensor
    test_ND: Tensor
    train_labels: list[np.ndarray]
    test_labels: list[np.ndarray]
    frequency_L: np.ndarray

    @property
    def labels(self) -> int:
        """Number of labels."""
        return len(self.frequency_L)

    def inverse_propensity(self) -> np.ndarray:
        """Of each label (Jain et al., KDD 2016, with the constants for most data sets)."""
        c = (np.log(len(self.train_labels)) - 1) * (PROPENSITY_B + 1) ** PROPENSITY_A
        return np.asarray(1 + c * (self.frequency_L + PROPENSITY_B) ** -PROPENSITY_A)


def load(folder: Path, dim: int, instances: int) -> Dataset:
    """Read a data set; ``instances``, if not 0, cuts the training split. Labels that it lacks are left out.

    Raises:
        FileNotFoundError: a file of the layout is missing.
    """
    train_labels, labels = _read_labels(folder / "trn_X_Y.txt")
    test_labels, _ = _read_labels(folder / "tst_X_Y.txt")
    train, test = _features(folder, "trn", len(train_labels)), _features(folder, "tst", len(test_labels))
    if 0 < instances < len(train_labels):
        kept = np.sort(np.random.default_rng(0).permutation(len(train_labels))[:instances])
        train, train_labels = train[kept], [train_labels[i] for i in kept]
    weigh = TfidfTransformer(sublinear_tf=True).fit(train)
    main = TruncatedSVD(dim, n_iter=2, random_state=0).fit(weigh.transform(train))
    frequency_L = np.bincount(np.concatenate(train_labels), minlength=labels)
    order = np.argsort(-frequency_L, kind="stable")[: int((frequency_L > 0).sum())]
    new_id = np.full(labels, -1)
    new_id[order] = np.arange(len(order))
    test_labels = [new_id[ids][new_id[ids] >= 0] for ids in test_labels]
    seen = np.array([i for i, ids in enumerate(test_labels) if len(ids)])

    def embedded(rows: Any) -> Tensor:
        return F.rms_norm(torch.from_numpy(main.transform(weigh.transform(rows))).float(), (dim,), eps=1e-12)

    return Dataset(
        train_ND=embedded(train),
        test_ND=embedded(test[seen]),
        train_labels=[new_id[ids] for ids in train_labels],
        test_labels=[test_labels[i] for i in seen],
        frequency_L=frequency_L[order],
    )


def _read_labels(path: Path) -> tuple[list[np.ndarray], int]:
    matrix = _read_matrix(path)
    return [
        matrix.indices[start:end] for start, end in zip(matrix.indptr, matrix.indptr[1:], strict=False)
    ], matrix.shape[1]


def _read_matrix(path: Path) -> Any:
    """A sparse matrix: a header "rows columns", then ``column:value`` entries a line."""
    header, *lines = path.read_text(encoding="utf-8").split("\n")
    rows, columns = map(int, header.split())
    entries = [[entry.split(":") for entry in line.split()] for line in lines[:rows]]
    pointers = np.cumsum([0, *map(len, entries)])
    column = np.array([int(entry[0]) for line in entries for entry in line])
    value = np.array([float(entry[1]) for line in entries for entry in line], dtype=np.float32)
    return sp.csr_matrix((value, column, pointers), shape=(rows, columns))


def _features(folder: Path, split: str, count: int) -> Any:
    path = folder / f"{split}_X_Xf.txt"
    if path.exists():
        return _read_matrix(path)
    texts = (folder / "raw" / f"{split}_X.txt").read_text(encoding="utf-8").split("\n")[:count]
    words = HashingVectorizer(n_features=HASH_FEATURES, alternate_sign=False, norm=None, ngram_range=(1, 2))
    return words.transform(texts)
