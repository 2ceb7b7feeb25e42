"""Files that pyxclib writes, the field's usual tool, come back as the matrices that they were made of."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.datasets import dump_svmlight_file

from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.shard import convert
from elmo_stream.data.store import open_store

ROWS, FEATURES, LABELS = 83, 50, 31


def matrices(seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Random features and labels: an empty row of each, and the last column of each in use."""
    chance = np.random.default_rng(seed)
    x_ND = chance.normal(size=(ROWS, FEATURES)) * (chance.random((ROWS, FEATURES)) < 0.2)
    y_NL = (chance.random((ROWS, LABELS)) < 0.1).astype(np.float64)
    x_ND[5], y_NL[7], x_ND[9, -1], y_NL[9, -1] = 0, 0, 0.25, 1
    return sp.csr_matrix(x_ND.astype(np.float32)), sp.csr_matrix(y_NL)


def one_file(folder: Path, split: str, x_ND: sp.csr_matrix, y_NL: sp.csr_matrix) -> Path:
    """As its ``write_data``: a header, and below it what scikit-learn dumps."""
    path = folder / f"{split}.txt"
    with open(path, "wb") as stream:
        stream.write(f"{x_ND.shape[0]} {x_ND.shape[1]} {y_NL.shape[1]}\n".encode())
        dump_svmlight_file(x_ND, y_NL, stream, multilabel=True)
    return path


def two_files(folder: Path, split: str, x_ND: sp.csr_matrix, y_NL: sp.csr_matrix) -> Path:
    """As its ``write_sparse_file``: a header, and Python's shortest spelling of every value."""
    paths = folder / f"{split}_X_Xf.txt", folder / f"{split}_X_Y.txt"
    for path, matrix in zip(paths, (x_ND, y_NL), strict=True):
        lines = [f"{matrix.shape[0]} {matrix.shape[1]}"]
        lines += [" ".join(f"{i}:{v}" for i, v in zip(row.indices, row.data, strict=True)) for row in matrix]
        path.write_text("".join(f"{line}\n" for line in lines))
    return paths[0]


@pytest.mark.parametrize("write", [one_file, two_files])
def test_what_pyxclib_writes_comes_back_as_the_same_matrices(tmp_path, write):
    given = matrices(seed=2)
    train = write(tmp_path, "trn", *matrices(seed=1))
    convert([train], tmp_path / "store", test=[write(tmp_path, "tst", *given)], workers=1)
    index = StoreIndex.load(tmp_path / "store")
    (entry,) = index.splits["test"].shards
    rows = open_store(tmp_path / "store").read_shard("test", entry)
    names = [int(name) for name in LabelNames(tmp_path / "store" / "labels")[np.arange(index.labels.count)]]
    kept = iter(range(rows.rows))
    for number, (x_D, y_L) in enumerate(zip(*given, strict=True)):
        row = next(kept)
        tokens = slice(rows.token_offsets[row], rows.token_offsets[row + 1])
        labels = rows.labels[rows.label_offsets[row] : rows.label_offsets[row + 1]]
        if x_D.nnz:
            assert rows.tokens[tokens].tolist() == x_D.indices.tolist(), number
            assert np.array_equal(rows.token_weights[tokens], x_D.data)
        assert sorted(names[label] for label in labels) == y_L.indices.tolist()
    assert next(kept, None) is None
