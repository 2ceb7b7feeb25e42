"""A store behind a URL gives the batches of the local one, and what is wrong with it is said with its URL."""

import functools
import http.server
import json
import random
import shutil
import threading

import fsspec
import pytest
import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.filters import load_filter
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.remote import RemoteFolder, local_store, shards_of
from elmo_stream.data.shard import convert
from elmo_stream.errors import CorruptError, UserError
from tests.cli_helpers import BAG, assert_refused, run_cli
from tests.data.readers.conftest import corpus as corpus_of
from tests.data.readers.conftest import write_format
from tests.data.shards import first_shard


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and counts requests by path."""

    def log_request(self, code="-", size="-"):
        self.server.asked.append(self.path)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve(tmp_path):
    """Serves a folder over HTTP on the loopback interface: folder -> server with ``url`` and ``asked``."""
    servers = []

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory(backend_store):
    """URL of the store in fsspec's memory file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(backend_store), "/stores/one", recursive=True)
    yield "memory://stores/one"
    filesystem.rm("/stores", recursive=True)


def batches(store):
    config = LoaderConfig(workers=2, prefetch=3, bucket=4)
    with StreamLoader(store, batch=100, seed=3, block_labels=1024, config=config) as loader:
        return [batch for _, batch in zip(range(loader.batches_per_epoch), loader, strict=False)]


def assert_same_batches(store, other):
    for mine, theirs in zip(batches(store), batches(other), strict=True):
        assert torch.equal(mine.token_ids_BT, theirs.token_ids_BT)
        assert torch.equal(mine.instance_B, theirs.instance_B)
        assert torch.equal(mine.positives.label_P, theirs.positives.label_P)


def test_a_store_over_http_gives_the_batches_of_the_local_one(backend_store, serve):
    url = f"{serve(backend_store).url}/"
    assert_same_batches(local_store(url), backend_store)


def test_a_store_in_any_file_system_of_fsspec_gives_the_same_batches(backend_store, memory):
    assert_same_batches(local_store(memory), backend_store)


def test_a_file_url_and_a_path_are_the_folder_itself(backend_store, cache):
    assert local_store(str(backend_store)) == backend_store
    assert local_store(f"file://{backend_store}") == backend_store
    assert not cache.exists()


def test_only_the_index_is_fetched_again_and_no_shard_before_it_is_needed(backend_store, serve):
    server = serve(backend_store)
    first = local_store(server.url)
    assert not any("shard" in path for path in server.asked)
    server.asked.clear()
    assert local_store(server.url) == first
    assert set(server.asked) == {"/index.json"}


def test_a_store_that_was_replaced_at_its_url_is_another(backend_store, sample, serve, tmp_path):
    place = shutil.copytree(backend_store, tmp_path / "place")
    server = serve(place)
    before = local_store(server.url)
    shutil.rmtree(place)
    sample.convert(place, seed=8, store=StoreIndex.load(backend_store).backend)
    after = local_store(server.url)
    assert after != before and StoreIndex.load(after).fingerprint == StoreIndex.load(place).fingerprint


@pytest.mark.parametrize("damage", ["flip", "cut", "extend", "remove"])
def test_damage_behind_a_url_is_named_by_its_url(backend_store, serve, tmp_path, damage):
    place = shutil.copytree(backend_store, tmp_path / "place")
    server, entry = serve(place), first_shard(backend_store)
    store = local_store(server.url)
    name = max(entry.files, key=lambda name: entry.files[name]["bytes"])
    path = place / "train" / entry.name / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "cut":
        del content[-1:]
    else:
        content += b"\0"
    if damage != "remove":
        path.write_bytes(content)
    url = f"{server.url}/train/{entry.name}/{name}"
    with pytest.raises(CorruptError, match=url):
        StoreIndex.load(store).verify(store, shards_of(store))
    with pytest.raises(CorruptError, match=url):
        batches(store)


@pytest.mark.parametrize("name", ["labels/names.bin", "tokenizer/tokenizer.json"])
def test_damaged_labels_are_not_taken_into_the_cache(backend_store, serve, tmp_path, cache, name):
    place = shutil.copytree(backend_store, tmp_path / "place")
    (place / name).write_bytes((place / name).read_bytes()[:-1])
    with pytest.raises(CorruptError, match=name):
        local_store(serve(place).url)
    assert list((cache / "elmo-stream" / "stores").iterdir()) == []


def test_texts_of_labels_and_filters_come_along(serve, tmp_path):
    files = write_format(tmp_path / "input", "xc-json", {"train": corpus_of(90, seed=1), "test": corpus_of(30, seed=2)})
    (tmp_path / "filter.txt").write_text("0 1\n7 3\n")
    store = tmp_path / "store"
    given = {"filter": tmp_path / "filter.txt", "tokenizer": "train:64", "workers": 1}
    convert([files["train"]], store, test=[files["test"]], **given)
    url = serve(store).url
    remote, index = local_store(url), StoreIndex.load(store)
    index.verify(remote, shards_of(remote))
    labels = range(index.labels.count)
    texts = LabelNames(remote / "labels").texts(labels)
    assert texts and texts == LabelNames(store / "labels").texts(labels)
    pairs, local_pairs = load_filter(remote, index, "test"), load_filter(store, index, "test")
    assert pairs.row_P.tolist() == local_pairs.row_P.tolist() == [0, 7]
    assert pairs.label_P.tolist() == local_pairs.label_P.tolist()
    (store / "filters" / "test.npy").write_bytes(b"damaged")
    shutil.rmtree(remote)
    with pytest.raises(CorruptError, match=f"{url}/filters/test.npy"):
        local_store(url)


def test_the_embeddings_and_names_of_a_store_behind_a_url_are_those_of_the_local_one(store, serve, tmp_path):
    keys = ["train.label_texts=true", "encoder.frozen=true"]
    options = [*BAG, *(word for key in keys for word in ("--set", key))]
    for place, run in ((serve(store).url, "remote"), (store, "local")):
        trained = run_cli("train", place, "--out", tmp_path / run, *options)
        assert trained.exit_code == 0, trained.output
    weights = "checkpoints/step-00000004/classifier/chunk-00000.safetensors"
    assert (tmp_path / "remote" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()


def test_a_server_that_gives_no_parts_of_a_file_is_read_all_the_same(serve, tmp_path):
    content = random.Random(0).randbytes(3_300_000)
    (tmp_path / "large").write_bytes(content)
    with (RemoteFolder(serve(tmp_path).url) / "large").open("rb") as stream:
        pieces = iter(lambda: stream.read(1 << 20), b"")
        assert b"".join(pieces) == content


def test_what_cannot_be_opened_says_why(serve, tmp_path):
    with pytest.raises(UserError, match="not a store"):
        local_store(serve(tmp_path).url)
    with pytest.raises(UserError, match="nosuch"):
        local_store("nosuch://bucket/store")
    server = serve(tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="cannot be read"):
        local_store(server.url)


def test_the_verbs_take_urls_and_writing_to_one_is_refused(corpus, store, run, serve, tmp_path):
    url = serve(store).url
    assert json.loads(run_cli("inspect", url, "--json").stdout)["fingerprint"] == StoreIndex.load(store).fingerprint
    assert run_cli("verify", url).exit_code == 0
    trained = run_cli("train", url, "--out", tmp_path / "run", *BAG)
    assert trained.exit_code == 0, trained.output
    weights = "checkpoints/step-00000004/classifier/chunk-00000.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (run / weights).read_bytes()
    remote, local = (run_cli("evaluate", run, *place, "--json") for place in ([url], []))
    assert json.loads(remote.stdout)["metrics"] == json.loads(local.stdout)["metrics"]
    for verb in (["shard", corpus / "train.jsonl"], ["train", store]):
        assert_refused(run_cli(*verb, "--out", "s3://bucket/new"), "s3://bucket/new", "URL", "index.json last")
