"""Ranking metrics of extreme multi-label classification, summed batch by batch.

Conventions are those of the Extreme Classification Repository (Bhatia et al., 2016) and, for propensities, of
Jain, Prabhu and Varma (KDD 2016, "Extreme Multi-label Loss Functions"). With hits rel_j in {0, 1} at rank j,
n true labels of an instance, and inverse propensities q:

    P@k       mean of sum_{j<=k} rel_j / k; k divides even when n < k
    nDCG@k    mean of sum_{j<=k} rel_j / log2(j+1) over sum_{j<=min(k,n)} 1 / log2(j+1)
    PSP@k     mean of sum_{j<=k} q rel_j over the mean of that sum for the best list: a ratio of means
    PSnDCG@k  the same ratio of means for nDCG with hits weighted by q, its denominators unweighted
    R@k       mean of sum_{j<=k} rel_j / n

An instance without true labels counts 0 and stays in every mean. Truth is a set: repeated labels count once.
Shape suffixes: B instances, K length of the lists, k number of cut-offs, P (row, label) pairs, L labels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elmo_stream.data.labels import InversePropensity

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_ID_BITS = 32  # ids are uint32 on disk, so a row and an id pack into one int64 key that sorts by row, then id
_ID_LIMIT = 1 << _ID_BITS


class RankingMetrics:
    """P@k, nDCG@k, R@k and, with propensities, PSP@k and PSnDCG@k over a stream of batches.

    Memory is O(batch), whatever the number of labels; sums are float64: the split into batches does not show.

    Args:
        ks: the cut-offs, distinct and at least 1, in the order of the report.
        inverse_propensity_L: float (L,), finite and positive, from the training split only; never copied. An
            ``InversePropensity`` forms those asked for. None leaves out PSP and PSnDCG.

    Raises:
        ValueError: no, repeated or non-positive cut-offs; propensities that are not a finite positive vector.
    """

    def __init__(self, ks: Sequence[int], inverse_propensity_L: np.ndarray | InversePropensity | None) -> None:
        if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
            raise ValueError(f"cut-offs must be distinct and at least 1, got {list(ks)}")
        if isinstance(inverse_propensity_L, np.ndarray):
            low, high = inverse_propensity_L.min(initial=1), inverse_propensity_L.max(initial=1)
            if inverse_propensity_L.ndim != 1 or not 0 < low <= high < np.inf:
                raise ValueError("inverse propensities must be a vector of finite positive numbers")
        self._q_L = inverse_propensity_L
        self._ks_k: Ints = np.array(ks, dtype=np.int64)
        self._discount_K: Floats = 1 / np.log2(np.arange(2, max(ks) + 2))
        self._sums: dict[str, Floats] = {}  # (2, k): the sum reached, and the sum that would be 100 %
        self._instances = 0

    @property
    def instances(self) -> int:
        """Number of instances seen, those without true labels included."""
        return self._instances

    @property
    def depth(self) -> int:
        """The largest cut-off."""
        return len(self._discount_K)

    def update(self, ids_BK: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> None:
        """Add a batch; nothing is added when it is refused.

        Args:
            ids_BK: integer (B, K), predicted label ids, best first; -1 is no prediction; K >= the largest k.
            labels: integer, flat true label ids of all instances.
            offsets: integer (B + 1,); instance i has labels[offsets[i]:offsets[i + 1]].

        Raises:
            ValueError: lists shorter than the largest k, a label predicted twice for an instance, malformed
                offsets, an id that is negative (-1 in lists excepted) or beyond the propensities or uint32.
            TypeError: ids or offsets that are not integers.
        """
        ids_BK, labels, offsets = map(_int64, (ids_BK, labels, offsets))
        instances, length = ids_BK.shape
        depth = self.depth
        if length < depth:
            raise ValueError(f"lists of {length} predictions are too short for a cut-off of {depth}")
        count_B = np.diff(offsets)
        whole = len(offsets) == instances + 1 and (offsets[0], offsets[-1]) == (0, len(labels))
        if not whole or count_B.min(initial=0) < 0:
            raise ValueError(f"offsets must rise from 0 to {len(labels)} in {instances} steps")
        limit = _ID_LIMIT if self._q_L is None else len(self._q_L)
        _check_range("predicted", ids_BK, -1, limit)
        _check_range("true", labels, 0, limit)
        _check_distinct(ids_BK)

        ids_BK = ids_BK[:, :depth]
        truth_P = np.unique(_keys(np.repeat(np.arange(instances), count_B), labels))
        row_P, label_P = truth_P >> _ID_BITS, truth_P & (_ID_LIMIT - 1)
        truths_B = np.bincount(row_P, minlength=instances)
        # An instance without true labels gains 0: any positive denominator avoids 0/0.
        reach_Bk = np.minimum(self._ks_k, np.where(truths_B > 0, truths_B, depth)[:, None])
        ideal_Bk = np.cumsum(self._discount_K)[reach_Bk - 1]
        hit_BK = _among(ids_BK, truth_P)
        hits_Bk = self._at_cutoffs(hit_BK)

        self._add("P", hits_Bk, instances * self._ks_k)
        self._add("nDCG", self._at_cutoffs(hit_BK * self._discount_K) / ideal_Bk, instances)
        if self._q_L is not None:
            gain_BK = np.where(hit_BK, self._q_L[ids_BK], 0).astype(np.float64)
            best_BK = _best_lists(self._q_L[label_P].astype(np.float64), row_P, truths_B, depth)
            dcg_Bk, best_dcg_Bk = (self._at_cutoffs(x_BK * self._discount_K) for x_BK in (gain_BK, best_BK))
            self._add("PSP", self._at_cutoffs(gain_BK), self._at_cutoffs(best_BK).sum(axis=0))
            self._add("PSnDCG", dcg_Bk / ideal_Bk, (best_dcg_Bk / ideal_Bk).sum(axis=0))
        self._add("R", hits_Bk / np.maximum(truths_B, 1)[:, None], instances)
        self._instances += instances

    def result(self) -> dict[str, float]:
        """Fractions keyed "P@1", ...; a propensity-scored metric is 0 when no instance has a true label.

        Raises:
            ValueError: no instance was seen, so that there is no mean.
        """
        if self._instances == 0:
            raise ValueError("metrics of no instances are undefined; evaluate a split that has instances")
        return {
            f"{name}@{k}": float(reached / whole) if whole > 0 else 0.0
            for name, sums_2k in self._sums.items()
            for k, reached, whole in zip(self._ks_k, *sums_2k, strict=True)
        }

    def _add(self, name: str, gain_Bk: np.ndarray, whole_k: Ints | Floats | int) -> None:
        gain_k = gain_Bk.sum(axis=0, dtype=np.float64)
        self._sums[name] = self._sums.get(name, 0) + np.stack(np.broadcast_arrays(gain_k, whole_k))

    def _at_cutoffs(self, gain_BK: np.ndarray) -> np.ndarray:
        return np.cumsum(gain_BK, axis=1)[:, self._ks_k - 1]


def drop_filtered(ids_BK: np.ndarray, row_P: np.ndarray, label_P: np.ndarray, k: int) -> Ints:
    """Remove the filter pairs (reciprocal pairs) from ranked lists and close the gaps: the next ones move up.

    Filtering precedes truncation: ask for K = min(L, k + the most pairs of any row), or lists end short.

    Args:
        ids_BK: integer (B, K), label ids, best first; -1 is no prediction.
        row_P: integer (P,), row in this batch of each pair.
        label_P: integer (P,), its label id; pairs that are not in the lists, and repeated ones, do no harm.
        k: length of the lists to return, at most K.

    Returns:
        int64 (B, k), the first k that stay, padded with -1.

    Raises:
        ValueError: k below 1 or above K, rows outside the batch, ids that are negative (-1 in lists excepted)
            or beyond uint32.
        TypeError: ids or rows that are not integers.
    """
    ids_BK, row_P, label_P = map(_int64, (ids_BK, row_P, label_P))
    instances, length = ids_BK.shape
    if not 1 <= k <= length:
        raise ValueError(f"cannot keep {k} of lists of {length} predictions")
    if len(row_P) != len(label_P) or ((row_P < 0) | (row_P >= instances)).any():
        raise ValueError(f"every filter pair needs a label and a row in 0...{instances - 1}")
    _check_range("predicted", ids_BK, -1, _ID_LIMIT)
    _check_range("filtered", label_P, 0, _ID_LIMIT)
    gone_BK = (ids_BK < 0) | _among(ids_BK, _keys(row_P, label_P))
    first_Bk = np.argsort(gone_BK, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.where(gone_BK, -1, ids_BK), first_Bk, axis=1)


def _int64(x: np.ndarray) -> Ints:
    return x.astype(np.int64, casting="safe", copy=False)


def _keys(row: Ints, label: Ints) -> Ints:
    return (row << _ID_BITS) + label


def _among(ids_BK: Ints, key_P: Ints) -> Bools:
    """Which predictions are one of the (row, label) pairs."""
    key_BK = _keys(np.arange(len(ids_BK))[:, None], ids_BK)
    # The table that isin would choose for dense keys is as large as their range.
    return (ids_BK >= 0) & np.isin(key_BK, key_P, kind="sort")


def _best_lists(q_P: Floats, row_P: Ints, truths_B: Ints, depth: int) -> Floats:
    """(B, depth): the largest q of each instance's true labels, best first, 0-padded; row_P is sorted."""
    q_P = q_P[np.lexsort((-q_P, row_P))]
    rank_P = np.arange(len(row_P)) - (np.cumsum(truths_B) - truths_B)[row_P]
    fits_P = rank_P < depth
    best_BK = np.zeros((len(truths_B), depth))
    best_BK[row_P[fits_P], rank_P[fits_P]] = q_P[fits_P]
    return best_BK


def _check_range(what: str, ids: Ints, low: int, limit: int) -> None:
    wrong = ids[(ids < low) | (ids >= limit)]
    if wrong.size:
        raise ValueError(f"{what} label id {wrong[0]} is outside {low}...{limit - 1}")


def _check_distinct(ids_BK: Ints) -> None:
    sorted_BK = np.sort(ids_BK, axis=1)
    row, column = np.nonzero((sorted_BK[:, 1:] == sorted_BK[:, :-1]) & (sorted_BK[:, 1:] >= 0))
    if row.size:
        raise ValueError(f"row {row[0]} predicts label {sorted_BK[row[0], column[0]]} more than once")
