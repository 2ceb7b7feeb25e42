"""Label names, ids and propensities: what a model's outputs mean, and what the metrics weigh them by."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_stream.data import label_build, label_runs
from elmo_stream.data.label_build import build_labels
from elmo_stream.data.label_runs import LabelCounter, Run
from elmo_stream.data.labels import LabelMap, LabelNames, inverse_propensity_L
from elmo_stream.errors import CorruptError, UserError

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def build(folder, rows, most=3):
    """Count rows with a counter that spills after ``most`` labels, and build the map."""
    for name in ("runs", "lookup", "labels"):
        (folder / name).mkdir()
    counter = LabelCounter(folder / "runs", most)
    for labels in rows:
        counter.add(labels)
    counter.close()
    runs = [Run(folder / "runs", name) for name in counter.runs]
    count = build_labels(runs, folder / "lookup", folder / "labels", folder / "lookup")
    return count, LabelNames(folder / "labels"), LabelMap(folder / "lookup")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(NAMES, max_size=5), min_size=1, max_size=25),
    others=st.lists(NAMES, max_size=10),
)
def test_ids_and_names_agree_with_a_dictionary_whatever_the_names_are(tmp_path_factory, rows, others):
    rows.append(["at least one"])
    counts = Counter(name for labels in rows for name in labels)
    count, names, label_map = build(tmp_path_factory.mktemp("labels"), rows)
    listed = names[range(count)]
    assert count == len(names) == len(counts) and set(listed) == set(counts)
    assert names.frequency_L.tolist() == [counts[name] for name in listed]
    assert names.frequency_L.tolist() == sorted(counts.values(), reverse=True)
    ids = {name: number for number, name in enumerate(listed)}
    asked = listed + others
    assert label_map.lookup(asked).tolist() == [ids.get(name, -1) for name in asked]


def test_numbering_does_not_depend_on_how_counts_were_spilled_and_merged(tmp_path, monkeypatch):
    rows = [[f"label {number % 97}", f"label {number % 31}"] for number in range(400)]
    monkeypatch.setattr(label_build, "_FAN_IN", 3)
    monkeypatch.setattr(label_build, "_BLOCK", 7)
    for most in (2, 1000):
        (tmp_path / str(most)).mkdir()
    _, many_runs, _ = build(tmp_path / "2", rows, most=2)
    _, one_run, _ = build(tmp_path / "1000", rows, most=1000)
    assert many_runs[range(97)] == one_run[range(97)]
    assert np.array_equal(many_runs.frequency_L, one_run.frequency_L)


def test_two_labels_with_one_hash_are_refused_rather_than_merged(tmp_path, monkeypatch):
    def weak_hash(names):
        return np.zeros(len(names), np.uint64), np.array([len(name) for name in names], np.uint64)

    monkeypatch.setattr(label_runs, "hash_names", weak_hash)
    with pytest.raises(UserError, match="'a' and 'bb' share a 64-bit hash"):
        build(tmp_path, [["a"], ["bb"]], most=1)


def test_building_takes_so_little_that_a_hundred_million_labels_fit_in_four_gib(tmp_path, monkeypatch):
    monkeypatch.setattr(label_build, "_BLOCK", 1024)  # the fixed part, made small beside the labels

    def peak(labels: int) -> int:
        folder = tmp_path / str(labels)
        folder.mkdir()
        tracemalloc.start()
        count, _, _ = build(folder, ([f"some label {number}"] for number in range(labels)), most=2_000)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == labels
        return top

    few, many = 10_000, 60_000
    assert (peak(many) - peak(few)) / (many - few) < 40


def test_names_are_refused_for_ids_that_do_not_exist(tmp_path):
    _, names, _ = build(tmp_path, [["a"], ["b"]])
    for ids in ([2], [-1]):
        with pytest.raises(IndexError):
            names[ids]


@pytest.mark.parametrize("name", ["names.bin", "offsets.npy", "frequency.npy"])
def test_missing_or_cut_label_files_are_named(tmp_path, name):
    build(tmp_path, [["alpha"], ["beta"]])
    path = tmp_path / "labels" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptError, match=name):
        LabelNames(tmp_path / "labels")
    path.unlink()
    with pytest.raises(CorruptError, match=name):
        LabelNames(tmp_path / "labels")


def test_damaged_names_are_reported_when_they_are_read(tmp_path):
    _, names, _ = build(tmp_path, [["alpha"], ["beta"]])
    (tmp_path / "labels" / "names.bin").write_bytes(b"\xff" * 9)
    with pytest.raises(CorruptError, match=r"names\.bin"):
        names[[0]]


@pytest.mark.parametrize(
    ("A", "B", "expected"),
    [
        (0.55, 1.5, [1.550663, 1.699627, 1.897075, 2.079442, 2.079442, 2.429605]),
        (0.6, 2.6, [1.599264, 1.750333, 1.931807, 2.079442, 2.079442, 2.31219]),
        (0.5, 0.4, [1.469513, 1.608887, 1.824437, 2.079442, 2.079442, 3.01945]),
    ],
)
def test_inverse_propensities_equal_those_of_the_literature(A, B, expected):
    rows = [[0, 1], [0, 2], [0, 3], [0, 1], [0, 4], [1, 2], [0], [0, 1]]
    frequency_L = np.bincount(np.concatenate(rows), minlength=6)
    assert np.allclose(inverse_propensity_L(frequency_L, len(rows), A, B), expected, atol=1e-6)


def test_no_label_weighs_less_than_one():
    assert np.array_equal(inverse_propensity_L(np.array([1, 2], np.uint32), 2, 0.55, 1.5), [1.0, 1.0])
