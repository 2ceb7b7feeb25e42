"""What only WebDataset shards promise: standard tars for other programs, and no trust in the tars of strangers."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from elmo_stream.data.store import Shard, concatenate, create_store, open_store
from elmo_stream.errors import CorruptError
from tests.data.shards import ARRAYS, assert_same, first_shard, forged, shard_of

ROWS = [([row, 7] * (row % 3 + 1), [row % 5, 5 + row % 3]) for row in range(1500)]


@pytest.fixture
def written(tmp_path):
    """(store, entry, tar) of a shard of two blocks."""
    store = create_store("webdataset", tmp_path, vocab_size=2000, num_labels=10)
    entry = store.write_shard("train", "shard-00000", shard_of(ROWS))
    return store, entry, tmp_path / "train" / "shard-00000" / "blocks.tar"


def test_the_webdataset_library_reads_a_shard(written):
    store, entry, tar = written
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["00000", "00001"]
    blocks = [
        Shard(**{name: sample[f"{name}.npy"] for name in ARRAYS if f"{name}.npy" in sample}) for sample in samples
    ]
    assert_same_values(concatenate(blocks), store.read_shard("train", entry))


def assert_same_values(one, other):
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def members(tar):
    """[name, payload] of every member, in order."""
    with tarfile.open(tar) as opened:
        return [[member.name, opened.extractfile(member).read()] for member in opened]


def tar_of(parts, format=tarfile.USTAR_FORMAT):
    """A tar of [name, payload] or [name, payload, changes of the TarInfo]."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, payload, *changes in parts:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_of_objects():
    return npy(np.array([print, "x"], dtype=object))


def renamed(name):
    return lambda parts: [[name, parts[0][1]], *parts[1:]]


FORGERIES = {
    "a duplicate member": lambda parts: [parts[0], *parts],
    "a member twice under one name": lambda parts: [*parts[:2], [parts[1][0], parts[1][1]], *parts[2:]],
    "a name that leads out of the folder": renamed("../../../00000.token_offsets.npy"),
    "an absolute name": renamed("/etc/00000.token_offsets.npy"),
    "another order": lambda parts: [parts[1], parts[0], *parts[2:]],
    "a missing member": lambda parts: parts[:-1],
    "a missing block": lambda parts: parts[:4],
    "another block after the last": lambda parts: [
        *parts,
        *([name.replace("00001", "00002"), data] for name, data in parts[4:]),
    ],
    "a link": lambda parts: [[parts[0][0], b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}], *parts[1:]],
    "a device": lambda parts: [[parts[0][0], b"", {"type": tarfile.CHRTYPE}], *parts[1:]],
    "pickled objects": lambda parts: [parts[0], [parts[1][0], npy_of_objects()], *parts[2:]],
    "a pickle": lambda parts: [parts[0], [parts[1][0], pickle.dumps(print)], *parts[2:]],
    "another type": lambda parts: [parts[0], [parts[1][0], npy(np.arange(9, dtype=np.float64))], *parts[2:]],
    "a matrix": lambda parts: [parts[0], [parts[1][0], npy(np.ones((4, 4), np.uint16))], *parts[2:]],
    "an empty member": lambda parts: [parts[0], [parts[1][0], b""], *parts[2:]],
    "rows moved between blocks": lambda parts: [parts[0], *parts[5:6], *parts[2:5], *parts[1:2], *parts[6:]],
}


def test_a_tar_written_by_others_in_the_same_way_is_read(written):
    store, entry, tar = written
    again = tar_of(members(tar))
    assert again == tar.read_bytes()
    assert_same(store.read_shard("train", forged(entry, "blocks.tar", again)), shard_of(ROWS))


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_tar_is_refused(written, what):
    store, entry, tar = written
    forgery = tar_of(FORGERIES[what](members(tar)))
    tar.write_bytes(forgery)
    with pytest.raises(CorruptError, match=r"blocks\.tar|index lists"):
        store.read_shard("train", forged(entry, "blocks.tar", forgery))


@pytest.mark.parametrize(
    "field", [b"77777777777", b"00000000000", b"-0000000001", b"           ", b"\x80" + b"\xff" * 10, b"0000001_000"]
)
def test_an_absurd_size_of_a_member_is_refused(written, field):
    store, entry, tar = written
    content = bytearray(tar.read_bytes())
    content[124:135] = field
    content[148:156] = b" " * 8
    content[148:155] = b"%06o\0" % sum(content[:512])
    tar.write_bytes(content)
    with pytest.raises(CorruptError, match=r"blocks\.tar"):
        store.read_shard("train", forged(entry, "blocks.tar", bytes(content)))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extended_headers_are_refused(written, format):
    store, entry, tar = written
    parts = [["a" * 300, b""], *members(tar)]
    forgery = tar_of(parts, format)
    tar.write_bytes(forgery)
    with pytest.raises(CorruptError, match=r"blocks\.tar"):
        store.read_shard("train", forged(entry, "blocks.tar", forgery))


def test_a_tokenized_corpus_is_a_list_of_standard_tars(sample, tmp_path):
    sample.convert(tmp_path / "store", store="webdataset")
    shard = open_store(tmp_path / "store").read_shard("train", first_shard(tmp_path / "store"))
    urls = str(tmp_path / "store/train/shard-{00000..00003}/blocks.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert samples[0]["tokens.npy"].tolist() == shard.tokens.tolist()
    assert sum(len(sample["token_offsets.npy"]) - 1 for sample in samples) == 1497
