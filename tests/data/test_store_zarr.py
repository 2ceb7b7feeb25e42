"""What only Zarr shards promise: other programs read them, and no header makes Zarr allocate what is not there."""

import json

import numpy as np
import pytest
import zarr

from elmo_stream.data.store import create_store, open_store
from elmo_stream.errors import CorruptError
from tests.data.shards import ARRAYS, assert_same, first_shard, forged, shard_of


@pytest.fixture
def written(tmp_path):
    """(store, entry, folder) of a shard of 50 rows."""
    store = create_store("zarr", tmp_path, vocab_size=1000, num_labels=1000)
    entry = store.write_shard(
        "train", "shard-00000", shard_of([(list(range(row, row + 9)), [row]) for row in range(50)])
    )
    return store, entry, tmp_path / "train" / "shard-00000"


def test_other_programs_can_read_a_shard_with_zarr_alone(sample_store):
    group = zarr.open_group(sample_store / "train" / "shard-00000", mode="r")
    shard = open_store(sample_store).read_shard("train", first_shard(sample_store))
    assert set(group.array_keys()) == set(ARRAYS) - {"token_weights"}
    for name in group.array_keys():
        assert np.array_equal(group[name][:], getattr(shard, name))


def test_an_array_beyond_the_chunk_size_is_split_and_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("elmo_stream.data.store_zarr._MAX_CHUNK_BYTES", 64)
    store = create_store("zarr", tmp_path, vocab_size=1000, num_labels=1000)
    shard = shard_of([(list(range(row, row + 9)), [row]) for row in range(50)])
    entry = store.write_shard("train", "shard-00000", shard)
    assert "tokens/c/14" in entry.files
    assert_same(store.read_shard("train", entry), shard)


@pytest.mark.parametrize("declared", [900 - 2, 2**40, 2**63, 0])
def test_a_frame_that_declares_another_size_is_refused_before_it_is_decoded(written, declared):
    store, entry, folder = written
    frame = (folder / "tokens/c/0").read_bytes()
    forgery = frame[:4] + b"\xc0\x58" + declared.to_bytes(8, "little") + frame[8:]
    (folder / "tokens/c/0").write_bytes(forgery)
    with pytest.raises(CorruptError, match="tokens/c/0"):
        store.read_shard("train", forged(entry, "tokens/c/0", forgery))


def test_a_frame_within_a_frame_is_refused_by_its_metadata(written):
    store, entry, folder = written
    path = folder / "tokens/zarr.json"
    value = json.loads(path.read_bytes())
    first, zstd, last = value["codecs"]
    forgery = json.dumps(value | {"codecs": [first, zstd, zstd, last]}).encode()
    path.write_bytes(forgery)
    with pytest.raises(CorruptError, match="which no shard is"):
        store.read_shard("train", forged(entry, "tokens/zarr.json", forgery))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**12]},
        {"data_type": "uint32"},
        {"codecs": []},
        {"fill_value": "x"},
        {"node_type": "group"},
    ],
)
def test_metadata_that_declares_another_array_is_refused(written, change):
    store, entry, folder = written
    path = folder / "tokens/zarr.json"
    forgery = json.dumps(json.loads(path.read_bytes()) | change).encode()
    path.write_bytes(forgery)
    with pytest.raises(CorruptError, match="shard-00000"):
        store.read_shard("train", forged(entry, "tokens/zarr.json", forgery))
