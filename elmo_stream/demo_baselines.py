"""What a model has to beat: the most frequent labels, and the labels of the nearest training texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmo_stream.errors import UserError

try:
    import scipy.sparse as sp
    from sklearn.feature_extraction.text import TfidfVectorizer
except ImportError as error:
    raise UserError("The demo's baselines need scikit-learn: install elmo-stream[demo].") from error

RANKS = (1, 3, 5)
_BLOCK_ROWS = 256


def baseline_precisions(train: Path, test: Path, neighbours: int = 50) -> dict[str, dict[str, float]]:
    """Precision of models that are not trained, on JSONL rows ``{"text", "labels"}``.

    ``popularity`` gives every test instance the labels that are most frequent in training. ``TF-IDF
    k-NN`` adds up the labels of the ``neighbours`` training texts of highest cosine similarity (sublinear
    TF-IDF over words), each vote weighted by that similarity. ``TF-IDF k-NN, sharp`` weights a vote by
    the cube of the similarity, so that near copies decide: a stronger opponent where texts repeat. Ties
    are broken by training frequency.

    Test labels unknown in training count as missed, and every test row counts.

    Returns:
        ``{baseline: {"P@1": percent, "P@3": percent, "P@5": percent}}``.

    Raises:
        UserError: a split is empty.
    """
    train_texts, train_labels = _read(train)
    test_texts, test_labels = _read(test)
    ids = _label_ids(train_labels)
    y_NL, truth_ML = _matrix(train_labels, ids), _matrix(test_labels, ids)
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    a_NV = vectorizer.fit_transform(train_texts)
    a_VN = a_NV.T.tocsr()
    b_MV = vectorizer.transform(test_texts)

    hits: dict[str, list[NDArray[np.bool_]]] = {
        name: [] for name in ("popularity", f"TF-IDF {neighbours}-NN", f"TF-IDF {neighbours}-NN, sharp")
    }
    for start in range(0, len(test_texts), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        truth_BL = truth_ML[block].toarray() > 0
        similarity_BN = _nearest((b_MV[block] @ a_VN).toarray(), neighbours)
        frequent_BL = np.broadcast_to(-np.arange(len(ids)), truth_BL.shape)
        votes = (frequent_BL, (similarity_BN @ y_NL).toarray(), (similarity_BN.power(3) @ y_NL).toarray())
        for found, vote_BL in zip(hits.values(), votes, strict=True):
            found.append(_hits(vote_BL, truth_BL))
    return {name: _precisions(np.concatenate(found)) for name, found in hits.items()}


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    with open(path, encoding="utf-8", newline="\n") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if not rows:
        raise UserError(f"{path}: has no rows, so there is nothing to compare.")
    return [row["text"] for row in rows], [row["labels"] for row in rows]


def _label_ids(labels: list[list[str]]) -> dict[str, int]:
    """Labels numbered by falling frequency, ties by name."""
    frequency: dict[str, int] = {}
    for label in (label for row in labels for label in row):
        frequency[label] = frequency.get(label, 0) + 1
    ordered = sorted(frequency, key=lambda label: (-frequency[label], label))
    return {label: number for number, label in enumerate(ordered)}


def _matrix(labels: list[list[str]], ids: dict[str, int]) -> sp.csr_matrix:
    """Rows of ones at the known labels."""
    known = [[ids[label] for label in row if label in ids] for row in labels]
    pointer = np.cumsum([0, *map(len, known)])
    columns = np.fromiter((column for row in known for column in row), np.int64, pointer[-1])
    return sp.csr_matrix((np.ones(len(columns), np.float32), columns, pointer), shape=(len(labels), len(ids)))


def _nearest(similarity_BN: NDArray[np.float32], neighbours: int) -> sp.csr_matrix:
    """Keep the highest similarities of each row."""
    rows, count = len(similarity_BN), min(neighbours, similarity_BN.shape[1])
    nearest_BK = np.argpartition(-similarity_BN, count - 1, axis=1)[:, :count]
    kept_BK = np.take_along_axis(similarity_BN, nearest_BK, axis=1)
    pointer = np.arange(0, rows * count + 1, count)
    return sp.csr_matrix((kept_BK.ravel(), nearest_BK.ravel(), pointer), shape=similarity_BN.shape)


def _hits(vote_BL: NDArray[Any], truth_BL: NDArray[np.bool_]) -> NDArray[np.bool_]:
    top_BK = np.argsort(-vote_BL, axis=1, kind="stable")[:, : max(RANKS)]
    return np.take_along_axis(truth_BL, top_BK, axis=1)


def _precisions(hits_MK: NDArray[np.bool_]) -> dict[str, float]:
    """Hits in the first k places over k, in percent; places beyond the number of labels are misses."""
    return {f"P@{k}": 100 * float(hits_MK[:, :k].sum()) / (k * len(hits_MK)) for k in RANKS}
