"""Parquet, .npz and packed files: whatever is wrong with them is said in a sentence, never guessed or executed."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import zstandard

from elmo_stream.data.readers import read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import Fields, InputFile
from elmo_stream.data.readers.unpack import packing_of, unpack
from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError
from tests.data.readers.bad_files import BAD_NPZ, BAD_PARQUET, Y, npz, parquet


def refusal(path: Path, content: bytes, **options: object) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert([path], path.parent / "store", workers=1, **options)
    assert not (path.parent / "store").exists()
    return str(caught.value)


@pytest.mark.parametrize(("content", "says"), BAD_PARQUET.values(), ids=BAD_PARQUET.keys())
def test_a_malformed_parquet_file_is_refused(tmp_path, content, says):
    message = refusal(tmp_path / "t.parquet", content)
    assert message.startswith(f"{tmp_path / 't.parquet'}: ") and says in message


@pytest.mark.parametrize("labels", [["x", "y"], [3, 14], [[3], [14, 15]]])
def test_labels_in_parquet_may_be_strings_ids_or_lists(tmp_path, labels):
    (tmp_path / "t.parquet").write_bytes(parquet({"text": ["a", "b"], "labels": labels}))
    source, fields = open_source(tmp_path / "t.parquet", "auto")[0], Fields()
    read = [one.labels for part in split_source(source, fields, 1) for one in read_part(part, fields)]
    assert read == [tuple(map(str, one if isinstance(one, list) else [one])) for one in labels]


@pytest.mark.parametrize(("content", "says"), BAD_NPZ.values(), ids=BAD_NPZ.keys())
def test_a_malformed_matrix_is_refused(tmp_path, content, says):
    (tmp_path / "Y.trn.npz").write_bytes(npz(Y))
    message = refusal(tmp_path / "X.trn.npz", content)
    assert "X.trn.npz" in message and says in message


def test_a_matrix_with_unsorted_and_repeated_entries_is_put_in_order(tmp_path):
    content = npz(data=np.array([1.0, 2.0, 4.0]), indices=np.array([2, 1, 2]), indptr=np.array([0, 3, 3]))
    (tmp_path / "X.trn.npz").write_bytes(content)
    scipy.sparse.save_npz(tmp_path / "Y.trn.npz", Y)
    source, _ = open_source(tmp_path / "X.trn.npz", "auto", labeled=False)
    (tmp_path / "plain").mkdir()
    main = unpack(source.main, tmp_path / "plain")
    fields = Fields(label=None)
    parts = split_source(type(source)("npz", main), fields, 1)
    rows = [one.features for part in parts for one in read_part(part, fields)]
    assert [(row.id_N.tolist(), row.weight_N.tolist()) for row in rows if row] == [([1, 2], [2.0, 5.0]), ([], [])]


LINE = json.dumps({"text": "a line of text", "labels": ["one"]}).encode() + b"\n"
PACKED = {
    ".gz": gzip.compress(LINE * 500),
    ".xz": lzma.compress(LINE * 500),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINE * 500),
}


@pytest.mark.parametrize("ending", PACKED)
def test_damaged_and_cut_packed_files_are_refused(tmp_path, ending):
    path, content = tmp_path / f"t.jsonl{ending}", PACKED[ending]
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0x55
    for wrong in (content[:-3], content[: len(content) // 2], bytes(damaged), content + b"more"):
        message = refusal(path, wrong)
        assert message.startswith(f"{path}: ") and ("cut" in message or "damaged" in message)


@pytest.mark.parametrize("ending", PACKED)
def test_members_one_behind_the_other_are_read_as_one_file(tmp_path, ending):
    path = tmp_path / f"t.jsonl{ending}"
    path.write_bytes(PACKED[ending] * 2)
    assert unpack(InputFile(path, path, packing_of(path)), tmp_path).path.read_bytes() == LINE * 1000


@pytest.mark.parametrize("ending", PACKED)
def test_zeros_that_fill_a_packed_file_up_to_a_block_are_no_damage(tmp_path, ending):
    path = tmp_path / f"t.jsonl{ending}"
    path.write_bytes(PACKED[ending] + bytes(20_000))
    assert unpack(InputFile(path, path, packing_of(path)), tmp_path).path.read_bytes() == LINE * 500


def test_a_bad_line_in_a_packed_file_is_named_by_its_place_in_the_text(tmp_path):
    message = refusal(tmp_path / "t.jsonl.gz", gzip.compress(LINE * 7 + b"{}\n"))
    assert message.startswith(f"{tmp_path / 't.jsonl.gz'}:8: field 'text' is missing")


def test_a_file_that_unpacks_to_one_endless_line_is_refused_before_it_fills_the_disk(tmp_path):
    path = tmp_path / "bomb.jsonl.xz"
    packer = lzma.LZMACompressor(preset=0)
    path.write_bytes(b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(200)), packer.flush()]))
    with pytest.raises(UserError, match="line of more than 64 MiB"):
        unpack(InputFile(path, path, "xz"), tmp_path)
    assert (tmp_path / "plain").stat().st_size < 80 << 20


@pytest.mark.parametrize("member", ["../outside.npy", "/outside.npy", "data.npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_member_that_leads_outside_or_occurs_twice_is_refused(tmp_path, member):
    path = tmp_path / "X.npz"
    path.write_bytes(npz())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, b"x")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=member):
        unpack(InputFile(path, path, "npz"), tmp_path / "in")
    assert not list((tmp_path / "in").iterdir()) and not (tmp_path / "outside.npy").exists()
