"""Reported figures follow the field's definitions; the oracle shares nothing with the implementation."""

import math
import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elmo_stream.training.metrics import RankingMetrics, drop_filtered

TRAIN = [[0, 1], [0, 2], [0, 3], [0, 1], [0, 4], [1, 2], [0], [0, 1]]
TRUTH = [[0, 3], [1, 2, 4], [0], []]
SCORES = np.array([[0.9, 0.8, 0.1, 0.7, 0.2, 0.05], [0.6, 0.5, 0.9, 0.1, 0.3, 0.2],
                   [0.1, 0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]])  # fmt: skip
FILTER = np.array([0, 1]), np.array([1, 2])
KS = [1, 2, 3, 4, 5]
EXPECTED = {
    "P": [0.5, 0.25, 0.333333, 0.3125, 0.25],
    "nDCG": [0.5, 0.306574, 0.40591, 0.456437, 0.456437],
    "PSP": [0.603855, 0.376502, 0.665641, 0.857173, 0.857173],
    "PSnDCG": [0.603855, 0.388995, 0.53663, 0.615012, 0.615012],
    "R": [0.208333, 0.208333, 0.416667, 0.5, 0.5],
}
EXPECTED_FILTERED = {
    "P": [0.25, 0.375, 0.333333, 0.25, 0.2],
    "PSP": [0.271591, 0.582021, 0.682438, 0.682438, 0.682438],
}


def inverse_propensity(train, labels, a=0.55, b=1.5):
    c = (math.log(len(train)) - 1) * (b + 1) ** a
    counts = [sum(label in row for row in train) for label in range(labels)]
    return np.array([1 + c * (f + b) ** -a for f in counts])


def ranked(scores_BL):
    """Scores of -inf are no predictions; ties go to the lower label id."""
    lists = [sorted((-s, i) for i, s in enumerate(row) if s > -math.inf) for row in scores_BL]
    return np.array([[i for _, i in row] + [-1] * (scores_BL.shape[1] - len(row)) for row in lists])


Q = inverse_propensity(TRAIN, labels=6)
LISTS = ranked(SCORES)


def ragged(rows):
    return np.array(list(chain(*rows)), np.int64), np.cumsum([0, *map(len, rows)])


def measured(lists, truth, ks, q=None):
    metrics = RankingMetrics(ks, q)
    metrics.update(lists, *ragged(truth))
    return metrics.result()


def brute_force(scores_BL, truth, ks, q):
    """Sparse truth, one instance and one rank at a time."""
    n, width = scores_BL.shape
    pairs = [(i, label) for i, row in enumerate(truth) for label in row]
    y = sp.csr_matrix((np.ones(len(pairs)), np.array(pairs, int).reshape(-1, 2).T), (n, width))
    for k in ks:
        p = ndcg = r = psp = psp_best = psd = psd_best = 0.0
        for i in range(n):
            true = set(y[i].indices.tolist())
            order = [j for j in np.lexsort((np.arange(width), -scores_BL[i])) if scores_BL[i, j] > -math.inf]
            ideal = sum(1 / math.log2(j + 2) for j in range(min(k, len(true) or k)))
            for j, label in enumerate(order[:k]):
                if label in true:
                    p += 1 / k
                    r += 1 / len(true)
                    ndcg += 1 / math.log2(j + 2) / ideal
                    psp += q[label]
                    psd += q[label] / math.log2(j + 2) / ideal
            for j, gain in enumerate(sorted((q[label] for label in true), reverse=True)[:k]):
                psp_best += gain
                psd_best += gain / math.log2(j + 2) / ideal
        yield from ((f"P@{k}", p / n), (f"nDCG@{k}", ndcg / n), (f"R@{k}", r / n))
        yield from ((f"PSP@{k}", psp / (psp_best or 1)), (f"PSnDCG@{k}", psd / (psd_best or 1)))


@st.composite
def problems(draw):
    """Few score levels (ties), level 0 is no prediction, empty truth rows, filter pairs of any label."""
    shape = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    levels = draw(arrays(np.int8, shape, elements=st.integers(0, 3)))
    truth = [np.flatnonzero(row).tolist() for row in draw(arrays(bool, shape))]
    q = draw(arrays(np.float64, shape[1], elements=st.floats(1, 50)))
    ks = draw(st.lists(st.integers(1, shape[1]), min_size=1, max_size=3, unique=True))
    return np.where(levels > 0, levels, -np.inf), truth, draw(arrays(bool, shape)), q, ks


@settings(max_examples=200, deadline=None)
@given(problems())
def test_figures_equal_a_brute_force_computation_with_ties_empty_rows_and_filters(problem):
    scores_BL, truth, filtered_BL, q, ks = problem
    for pairs_BL in (np.zeros_like(filtered_BL), filtered_BL):
        lists = drop_filtered(ranked(scores_BL), *sp.coo_matrix(pairs_BL).coords, k=max(ks))
        expected = dict(brute_force(np.where(pairs_BL, -np.inf, scores_BL), truth, ks, q))
        assert measured(lists, truth, ks, q) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 100), max_size=8))
def test_the_split_into_batches_never_shows_in_the_figures(seed, cuts):
    rng = np.random.default_rng(seed)
    truth = [rng.choice(50, n, replace=False).tolist() for n in rng.integers(0, 9, 100)]
    lists, q = ranked(rng.random((100, 50)))[:, :9], rng.uniform(1, 99, 50)
    split = RankingMetrics([1, 3, 7], q)
    edges = [0, *sorted(cuts), 100]
    for start, stop in pairwise(edges):
        split.update(lists[start:stop], *ragged(truth[start:stop]))
    assert split.instances == 100
    whole = pytest.approx(measured(lists, truth, [1, 3, 7], q), rel=1e-12, abs=0)
    assert split.result() == whole
    for i in range(100):  # all of it again, one by one: every mean stays
        split.update(lists[i : i + 1], *ragged(truth[i : i + 1]))
    assert split.result() == whole


def test_the_reference_vectors_come_out():
    np.testing.assert_allclose(Q, [1.550663, 1.699627, 1.897075, 2.079442, 2.079442, 2.429605], rtol=0, atol=5e-7)
    result = measured(LISTS, TRUTH, KS, Q)
    assert list(result) == [f"{name}@{k}" for name in EXPECTED for k in KS]
    assert list(result.values()) == pytest.approx(list(chain(*EXPECTED.values())), abs=5e-7)


def test_filtered_pairs_make_room_for_the_next_predictions():
    result = measured(drop_filtered(LISTS, *FILTER, k=5), TRUTH, KS, Q)
    for name, expected in EXPECTED_FILTERED.items():
        assert [result[f"{name}@{k}"] for k in KS] == pytest.approx(expected, abs=5e-7)
    too_late = measured(drop_filtered(LISTS[:, :3], *FILTER, k=3), TRUTH, [3])
    assert (too_late["P@3"], result["P@3"]) == pytest.approx((0.25, 1 / 3))


def test_long_lists_keep_their_order_when_pairs_and_holes_go():
    lists = np.array([[*range(99, 49, -1), -1, *range(50)]])
    kept = drop_filtered(lists, np.zeros(50, int), np.arange(1, 100, 2), k=60)
    assert kept.tolist() == [[*range(98, 49, -2), *range(0, 50, 2), *[-1] * 10]]


def test_without_propensities_no_propensity_scored_figure_is_reported():
    assert list(measured(LISTS, TRUTH, [3, 1])) == ["P@3", "P@1", "nDCG@3", "nDCG@1", "R@3", "R@1"]


def test_a_true_label_listed_twice_counts_once():
    doubled = [row + row[::-1] for row in TRUTH]
    assert measured(LISTS, doubled, KS, Q) == measured(LISTS, TRUTH, KS, Q)


def test_a_split_without_any_true_label_scores_zero():
    assert set(measured(np.array([[2, 0]]), [[]], [1, 2], np.ones(3)).values()) == {0.0}


def test_the_largest_label_ids_are_exact_and_memory_follows_the_batch():
    top = 2**32 - 1
    lists = np.tile([top, -1, top - 1], (4096, 1))
    lists[1::2, 0] = top - 2
    tracemalloc.start()
    result = measured(lists, [[top]] * 4096, [1, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (result["P@1"], result["P@3"], result["R@3"]) == (0.5, 0.5 / 3, 0.5)
    assert peak < 4 << 20


@pytest.mark.parametrize(("lists", "labels", "offsets", "sentence"), [
    ([[1, 0, 2], [3, 0, 3]], [0], [0, 1, 1], "row 1 predicts label 3 more than once"),
    ([[1]], [0], [0, 1], "lists of 1 predictions are too short for a cut-off of 2"),
    ([[1, 4]], [0], [0, 1], r"predicted label id 4 is outside -1\.\.\.3"),
    ([[1, -2]], [0], [0, 1], r"predicted label id -2 is outside -1\.\.\.3"),
    ([[1, 0]], [4], [0, 1], r"true label id 4 is outside 0\.\.\.3"),
    ([[1, 0]], [-1], [0, 1], r"true label id -1 is outside 0\.\.\.3"),
    ([[1, 0]], [0], [0, 1, 1], "offsets must rise from 0 to 1"),
    ([[1, 0], [1, 0]], [0], [0, 2, 1], "offsets must rise from 0 to 1"),
])  # fmt: skip
def test_a_broken_batch_is_refused_and_leaves_the_sums_alone(lists, labels, offsets, sentence):
    metrics, good = RankingMetrics([1, 2], np.ones(4)), (np.array([[3, 1]]), [[1]])
    with pytest.raises(ValueError, match=sentence):
        metrics.update(np.array(lists), np.array(labels), np.array(offsets))
    metrics.update(good[0], *ragged(good[1]))
    assert metrics.result() == measured(*good, [1, 2], np.ones(4))


def test_what_has_no_meaning_is_refused():
    lists = np.array([[1, 0]])
    for ks in ([], [0], [1, 1]):
        with pytest.raises(ValueError, match="cut-offs must be distinct and at least 1"):
            RankingMetrics(ks, None)
    for q_L in ([1, np.nan], [1, np.inf], [0, 1], [[1, 1]]):
        with pytest.raises(ValueError, match="vector of finite positive"):
            RankingMetrics([1], np.array(q_L))
    with pytest.raises(ValueError, match="no instances"):
        RankingMetrics([1], None).result()
    with pytest.raises(TypeError, match="float32"):
        measured(lists.astype(np.float32), [[0]], [1])
    for ids, row, label, k, sentence in (
        (lists, 0, 0, 3, "cannot keep 3 of lists of 2"),
        (lists, 1, 0, 2, r"row in 0\.\.\.0"),
        (lists, 0, -1, 2, "filtered label id -1 is outside"),
        (lists - 2, 0, 0, 2, "predicted label id -2 is outside"),
    ):
        with pytest.raises(ValueError, match=sentence):
            drop_filtered(ids, np.array([row]), np.array([label]), k)
