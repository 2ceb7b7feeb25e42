"""A shard that is read is the shard that was written; anything else is an error that names the file."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import zarr

from elmo_stream.data.index import ShardEntry, StoreIndex
from elmo_stream.data.store import Shard, concatenate, create_store, open_store
from elmo_stream.errors import CorruptError, UserError

ARRAYS = ("tokens", "token_offsets", "labels", "label_offsets")


def shard_of(rows: list[tuple[list[int], list[int]]], dtype: type = np.uint16) -> Shard:
    """A shard of (tokens, labels) rows."""
    return Shard(
        tokens=np.array([token for tokens, _ in rows for token in tokens], dtype),
        token_offsets=np.cumsum([0, *(len(tokens) for tokens, _ in rows)]),
        labels=np.array([label for _, labels in rows for label in labels], np.int64),
        label_offsets=np.cumsum([0, *(len(labels) for _, labels in rows)]),
    )


def assert_same(one: Shard, other: Shard) -> None:
    for name in ARRAYS:
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype and np.array_equal(left, right), name


@pytest.fixture
def copy(sample_store, tmp_path):
    """A copy of the store, to be damaged."""
    return shutil.copytree(sample_store, tmp_path / "copy")


def first_shard(store) -> ShardEntry:
    return StoreIndex.load(store).splits["train"].shards[0]


@pytest.mark.parametrize(
    ("rows", "vocab_size", "num_labels"),
    [
        ([([0], [])], 10, 1),
        ([([0, 0], [0]), ([0], [])], 10, 1),
        ([([65_534], [2**32 - 3]), ([3], [0, 1, 2**32 - 3])], 65_535, 2**32 - 2),
        ([([65_536, 1], [5])], 65_537, 6),
    ],
)
def test_a_shard_comes_back_as_it_was_written(tmp_path, rows, vocab_size, num_labels):
    store = create_store("zarr", tmp_path, vocab_size=vocab_size, num_labels=num_labels)
    written = shard_of(rows, np.uint16 if vocab_size < 65_536 else np.uint32)
    entry = store.write_shard("train", "shard-00000", written)
    assert (entry.rows, entry.tokens) == (len(rows), len(written.tokens))
    assert_same(store.read_shard("train", entry), written)
    assert store.describe_shard("train", "shard-00000") == entry
    assert store.describe_shard("train", "shard-00001") is None


def test_an_array_beyond_the_chunk_size_is_split_and_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("elmo_stream.data.store_zarr._MAX_CHUNK_BYTES", 64)
    store = create_store("zarr", tmp_path, vocab_size=1000, num_labels=1000)
    written = shard_of([(list(range(row, row + 9)), [row]) for row in range(50)])
    entry = store.write_shard("train", "shard-00000", written)
    assert "tokens/c/14" in entry.files
    assert_same(store.read_shard("train", entry), written)


def test_other_programs_can_read_a_shard_with_zarr_alone(sample_store):
    group = zarr.open_group(sample_store / "train" / "shard-00000", mode="r")
    shard = open_store(sample_store).read_shard("train", first_shard(sample_store))
    for name in ARRAYS:
        assert np.array_equal(group[name][:], getattr(shard, name))


def test_a_shard_is_never_overwritten(copy):
    store = create_store("zarr", copy, vocab_size=10, num_labels=1)
    with pytest.raises(UserError, match="exists already"):
        store.write_shard("train", "shard-00000", shard_of([([0], [])]))


@pytest.mark.parametrize("name", [f"{name}/{file}" for name in ARRAYS for file in ("c/0", "zarr.json")] + ["zarr.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_of_a_shard_is_named(copy, name, damage):
    entry, path = first_shard(copy), copy / "train" / "shard-00000" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        chance = random.Random(name)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        open_store(copy).read_shard("train", entry)
    assert str(path) in str(caught.value)
    with pytest.raises(CorruptError) as caught:
        StoreIndex.load(copy).verify(copy)
    assert str(path) in str(caught.value)


def test_every_single_flipped_bit_of_a_chunk_is_noticed(copy):
    entry, path = first_shard(copy), copy / "train" / "shard-00000" / "labels" / "c" / "0"
    store, content, chance = open_store(copy), path.read_bytes(), random.Random(0)
    for _ in range(40):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CorruptError):
            store.read_shard("train", entry)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([([10], [])], "token id is not below"),
        ([([1], [3])], "label id is not below"),
        ([([1], [1, 0])], "ascending"),
        ([([1], [1, 1])], "ascending"),
        ([([1], [0, 2]), ([], [])], "token_offsets"),
    ],
)
def test_content_that_would_mislead_training_is_refused(tmp_path, rows, says):
    store = create_store("zarr", tmp_path, vocab_size=10, num_labels=3)
    entry = store.write_shard("train", "shard-00000", shard_of(rows))
    with pytest.raises(CorruptError, match=says):
        store.read_shard("train", entry)


@pytest.mark.parametrize("change", [{"rows": 1}, {"tokens": 10**12}, {"positives": 3}, {"files": {}}])
def test_an_index_that_promises_other_sizes_is_refused_before_anything_is_allocated(copy, change):
    entry = dataclasses.replace(first_shard(copy), **change)
    with pytest.raises(CorruptError, match="shard-00000"):
        open_store(copy).read_shard("train", entry)


def test_rows_can_be_taken_cut_and_joined():
    rows = [([row] * (row % 3 + 1), list(range(row % 4))) for row in range(9000)]
    shard = shard_of(rows)
    order = np.random.default_rng(0).permutation(9000)
    assert_same(shard.take(order), shard_of([rows[place] for place in order]))
    assert_same(concatenate([shard.rows_between(0, 10), shard.rows_between(10, 9000)]), shard)


def write_index(store, change) -> None:
    path = store / "index.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda value: value.update(version=3), UserError, "version 3"),
        (lambda value: value.update(format="other"), CorruptError, "'format'"),
        (lambda value: value.update(seed=1), CorruptError, "fingerprint"),
        (lambda value: value.update(extra=1), CorruptError, "exactly the keys"),
        (lambda value: value.pop("labels"), CorruptError, "exactly the keys"),
        (lambda value: value.update(seed=-1), CorruptError, "seed"),
        (lambda value: value.update(seed=True), CorruptError, "seed"),
        (lambda value: value.update(backend="other"), CorruptError, "backend"),
        (lambda value: value["labels"].update(files={"../x": {}}), CorruptError, "not the name of a file"),
        (lambda value: value["labels"].update(files={"x": 1}), CorruptError, "expected bytes and sha256"),
        (lambda value: value["tokenizer"].update(kind=3), CorruptError, "kind"),
    ],
)
def test_an_altered_index_is_refused_and_says_where(copy, change, error, says):
    write_index(copy, change)
    with pytest.raises(error, match=says):
        StoreIndex.load(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: {"labels": dataclasses.replace(index.labels, count=0)}, "labels.count"),
        (lambda index: {"splits": {}}, "splits"),
        (lambda index: {"splits": index.splits | {"other": index.splits["test"]}}, "splits"),
        (lambda index: {"splits": {"train": dataclasses.replace(index.splits["train"], tokens=1)}}, "add up"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copy, change, says):
    index = StoreIndex.load(copy)
    dataclasses.replace(index, **change(index)).save(copy)
    with pytest.raises(CorruptError, match=says):
        StoreIndex.load(copy)


def test_the_name_of_a_shard_cannot_lead_out_of_the_store(copy):
    index = StoreIndex.load(copy)
    train = index.splits["train"]
    shards = (dataclasses.replace(train.shards[0], name="../../shard-00000"), *train.shards[1:])
    splits = {"train": dataclasses.replace(train, shards=shards)}
    dataclasses.replace(index, splits=splits).save(copy)
    with pytest.raises(CorruptError, match="not a shard's name"):
        StoreIndex.load(copy)


def test_a_folder_that_is_no_store_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_store(tmp_path / "missing")
    with pytest.raises(UserError, match="not a store"):
        open_store(tmp_path)


def test_an_index_survives_a_round_trip(sample_store, tmp_path):
    index = StoreIndex.load(sample_store)
    index.save(tmp_path)
    assert StoreIndex.load(tmp_path) == index
    assert (tmp_path / "index.json").read_bytes() == (sample_store / "index.json").read_bytes()
