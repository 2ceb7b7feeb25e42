"""What every storage backend must do; a new one is added to ``BACKENDS`` and passes unchanged.

A shard that is read is the shard that was written, and anything else is an error that names the file, even where the
index was forged to agree with the damage.
"""

import dataclasses
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.store import Shard, concatenate, create_store, open_store
from elmo_stream.errors import CorruptError, UserError
from tests.data.shards import assert_same, first_shard, forged, shard_of


@pytest.fixture
def copy(backend_store, tmp_path):
    """A copy of the store, to be damaged."""
    return shutil.copytree(backend_store, tmp_path / "copy")


def random_shard(rows: int, seed: int) -> Shard:
    """Rows of 1 to 9 tokens and 0 to 4 labels."""
    chance = random.Random(seed)
    return shard_of(
        [
            (
                chance.choices(range(1000), k=chance.randint(1, 9)),
                sorted(chance.sample(range(500), k=chance.randint(0, 4))),
            )
            for _ in range(rows)
        ]
    )


def with_weights(shard: Shard, seed: int) -> Shard:
    """The rows with a weight for every token."""
    weights = np.random.default_rng(seed).normal(size=len(shard.tokens)).astype(np.float32)
    return dataclasses.replace(shard, token_weights=weights)


def batches(store):
    config = LoaderConfig(workers=2, prefetch=3, bucket=4)
    with StreamLoader(store, batch=48, seed=3, block_labels=1024, config=config) as loader:
        return [batch for _, batch in zip(range(loader.batches_per_epoch + 5), loader, strict=False)]


@pytest.mark.parametrize(
    ("rows", "vocab_size", "num_labels"),
    [
        ([([0], [])], 10, 1),
        ([([0, 0], [0]), ([0], [])], 10, 1),
        ([([65_534], [2**32 - 3]), ([3], [0, 1, 2**32 - 3])], 65_535, 2**32 - 2),
        ([([65_536, 1], [5])], 65_537, 6),
    ],
)
def test_a_shard_comes_back_as_it_was_written(backend, tmp_path, rows, vocab_size, num_labels):
    store = create_store(backend, tmp_path, vocab_size=vocab_size, num_labels=num_labels)
    written = shard_of(rows, np.uint16 if vocab_size < 65_536 else np.uint32)
    entry = store.write_shard("train", "shard-00000", written)
    assert (entry.rows, entry.tokens, entry.positives) == (len(rows), len(written.tokens), len(written.labels))
    assert_same(store.read_shard("train", entry), written)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 5000])
def test_the_entry_of_a_shard_can_be_had_again_from_its_files(backend, tmp_path, rows):
    store = create_store(backend, tmp_path, vocab_size=1000, num_labels=500)
    written = random_shard(rows, seed=rows)
    entry = store.write_shard("train", "shard-00000", written)
    assert store.describe_shard("train", "shard-00000") == entry
    assert store.describe_shard("train", "shard-00001") is None
    assert_same(store.read_shard("train", entry), written)


@pytest.mark.parametrize("rows", [1, 1024, 2500])
def test_the_weights_of_tokens_come_back_to_the_bit(backend, tmp_path, rows):
    store = create_store(backend, tmp_path, vocab_size=1000, num_labels=500, weighted=True)
    written = with_weights(random_shard(rows, seed=rows), seed=rows)
    entry = store.write_shard("train", "shard-00000", written)
    assert store.describe_shard("train", "shard-00000") == entry
    assert_same(store.read_shard("train", entry), written)
    unweighted = create_store(backend, tmp_path, vocab_size=1000, num_labels=500)
    with pytest.raises(CorruptError, match="shard-00000"):
        unweighted.read_shard("train", entry)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(backend, tmp_path, weight):
    store = create_store(backend, tmp_path, vocab_size=1000, num_labels=500, weighted=True)
    written = with_weights(random_shard(1500, seed=0), seed=0)
    written.token_weights[-1] = weight
    entry = store.write_shard("train", "shard-00000", written)
    with pytest.raises(CorruptError, match="token_weights"):
        store.read_shard("train", entry)


def test_features_give_the_same_bytes_from_every_backend_and_number_of_workers(backend, features, tree, tmp_path):
    features.convert(tmp_path / "one", store=backend)
    features.convert(tmp_path / "two", store=backend, workers=2)
    features.convert(tmp_path / "zarr")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    pairs = list(zip(batches(tmp_path / "one"), batches(tmp_path / "zarr"), strict=True))
    assert len(pairs) > 30
    for mine, reference in pairs:
        assert mine.weight_BT is not None and reference.weight_BT is not None
        for name in ("token_ids_BT", "mask_BT", "weight_BT", "instance_B"):
            assert torch.equal(getattr(mine, name), getattr(reference, name)), name


def test_batches_are_the_same_bytes_as_from_any_other_backend(backend_store, sample_store):
    pairs = list(zip(batches(backend_store), batches(sample_store), strict=True))
    assert len(pairs) > 30
    for mine, reference in pairs:
        for name in ("token_ids_BT", "mask_BT", "instance_B"):
            assert torch.equal(getattr(mine, name), getattr(reference, name)), name
        for field in dataclasses.fields(mine.positives):
            assert torch.equal(getattr(mine.positives, field.name), getattr(reference.positives, field.name)), field


def test_the_same_input_gives_the_same_bytes(backend, backend_store, sample, tree, tmp_path):
    sample.convert(tmp_path / "again", store=backend, workers=2)
    assert tree(tmp_path / "again") == tree(backend_store)


def test_a_shard_is_never_overwritten(backend, copy, tree):
    before = tree(copy)
    store = create_store(backend, copy, vocab_size=10, num_labels=1)
    with pytest.raises(UserError, match="exists already"):
        store.write_shard("train", "shard-00000", shard_of([([0], [])]))
    assert tree(copy) == before


def test_threads_can_read_at_once(backend_store):
    store, entries = open_store(backend_store), StoreIndex.load(backend_store).splits["train"].shards
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda entry: store.read_shard("train", entry), entries * 8))
    for place, shard in enumerate(found):
        assert_same(shard, found[place % len(entries)])


@pytest.mark.parametrize("damage", ["flip", "cut", "extend", "remove"])
def test_a_damaged_file_of_a_shard_is_named(copy, damage):
    entry, chance = first_shard(copy), random.Random(damage)
    for name in entry.files:
        path = copy / "train" / entry.name / name
        content = path.read_bytes()
        damaged = bytearray(content)
        if damage == "flip":
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif damage == "cut":
            del damaged[chance.randrange(len(content)) :]
        else:
            damaged += b"\0"
        path.unlink()
        if damage != "remove":
            path.write_bytes(damaged)
        for look in (lambda: open_store(copy).read_shard("train", entry), lambda: StoreIndex.load(copy).verify(copy)):
            with pytest.raises(CorruptError) as caught:
                look()
            assert str(path) in str(caught.value)
        path.write_bytes(content)
    open_store(copy).read_shard("train", entry)


def test_damage_that_a_forged_index_agrees_with_is_an_error_or_harmless(copy):
    entry, store = first_shard(copy), open_store(copy)
    refused = 0
    for name in entry.files:
        path, chance = copy / "train" / entry.name / name, random.Random(name)
        content = path.read_bytes()
        for _ in range(180 // len(entry.files)):
            damaged, at = bytearray(content), chance.randrange(len(content))
            what = chance.randrange(4)
            if what == 0:
                damaged[at] ^= 1 << chance.randrange(8)
            elif what == 1:
                del damaged[at : at + chance.randrange(1, 600)]
            elif what == 2:
                damaged[at:at] = chance.randbytes(chance.randrange(1, 600))
            else:
                damaged[at : at + 16] = b"\xff" * 16
            path.write_bytes(damaged)
            try:
                shard = store.read_shard("train", forged(entry, name, bytes(damaged)))
            except CorruptError as error:
                assert entry.name in str(error)
                refused += 1
            else:
                assert (shard.rows, len(shard.tokens), len(shard.labels)) == (entry.rows, entry.tokens, entry.positives)
        path.write_bytes(content)
    assert refused > 30


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
def test_content_that_would_mislead_training_is_refused(backend, tmp_path, rows, says):
    store = create_store(backend, tmp_path, vocab_size=10, num_labels=3)
    entry = store.write_shard("train", "shard-00000", shard_of(rows))
    with pytest.raises(CorruptError, match=says):
        store.read_shard("train", entry)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [0, -1, 2, 3], [0, 2**63 - 1, -(2**63) + 5, 3], [0, 1, 2, 2**62]])
@pytest.mark.parametrize("name", ["token_offsets", "label_offsets"])
def test_offsets_that_point_elsewhere_are_refused(backend, tmp_path, name, offsets):
    store = create_store(backend, tmp_path, vocab_size=10, num_labels=3)
    shard = shard_of([([1], [0]), ([2], [1]), ([3], [2])])
    entry = store.write_shard("train", "shard-00000", dataclasses.replace(shard, **{name: np.array(offsets)}))
    with pytest.raises(CorruptError, match="shard-00000"):
        store.read_shard("train", entry)


@pytest.mark.parametrize(
    "change",
    [{"rows": 1}, {"rows": 10**15}, {"tokens": 10**15}, {"tokens": 10}, {"positives": 3}, {"positives": 2**60}],
)
def test_an_index_that_promises_other_sizes_is_refused_before_anything_is_allocated(copy, change):
    entry = dataclasses.replace(first_shard(copy), **change)
    with pytest.raises(CorruptError, match="shard-00000"):
        open_store(copy).read_shard("train", entry)


@pytest.mark.parametrize("name", ["more", "../../index.json", "/etc/hostname"])
def test_an_index_that_lists_other_files_is_refused(copy, name):
    entry = first_shard(copy)
    for files in ({}, entry.files | {name: {"bytes": 1, "sha256": "0" * 64}}):
        with pytest.raises(CorruptError, match="shard-00000"):
            open_store(copy).read_shard("train", dataclasses.replace(entry, files=files))


def test_a_file_that_is_listed_as_larger_than_it_can_be_is_not_read(copy):
    entry = first_shard(copy)
    for name, listed in entry.files.items():
        larger = dataclasses.replace(entry, files=entry.files | {name: listed | {"bytes": 10**12}})
        with pytest.raises(CorruptError, match="shard-00000"):
            open_store(copy).read_shard("train", larger)


def test_rows_can_be_taken_cut_and_joined():
    rows = [([row] * (row % 3 + 1), list(range(row % 4))) for row in range(9000)]
    shard = shard_of(rows)
    order = np.random.default_rng(0).permutation(9000)
    assert_same(shard.take(order), shard_of([rows[place] for place in order]))
    assert_same(concatenate([shard.rows_between(0, 10), shard.rows_between(10, 9000)]), shard)
