"""A store behind a server that fails three answers of ten: the batches are those of the local store, in their order."""

import http.server
import os
import random
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import BACKENDS, StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.remote import local_store, shards_of
from tests.torture.materials import make_store
from tests.torture.tally import Tally

SHARE = 0.3
FAULTS = ("503", "reset", "cut", "slow")


class _Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and breaks answers at random; ``server.chance`` draws, ``server.broken`` counts by fault."""

    server: Any

    def do_GET(self) -> None:
        with self.server.lock:
            fault = self.server.chance.choice(FAULTS) if self.server.chance.random() < SHARE else ""
            self.server.broken[fault] = self.server.broken.get(fault, 0) + 1
        if fault == "503":
            self.send_error(503)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self._send(cut=fault == "cut", slow=fault == "slow")

    def _send(self, *, cut: bool, slow: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content), 512):
            if cut and 2 * start >= len(content):
                self.close_connection = True
                return
            self.wfile.write(content[start : start + 512])
            if slow and start < 2048:
                threading.Event().wait(0.01)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the connection that was reset, or a client that gave up
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def faulty_server(folder: Path, seed: int) -> Iterator[Any]:
    """Serves ``folder`` over HTTP on the loopback interface."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Faulty, directory=str(folder)))
    server.chance, server.lock, server.broken = random.Random(seed), threading.Lock(), {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try is an epoch over a store behind such a server, from opening it on."""
    tally = Tally()
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        stores = [make_store(folder, backend, rows=200) for backend in BACKENDS]
        for number in range(tries):
            _try(stores[number % len(stores)], seed * 10_000 + number, tally)
            shutil.rmtree(folder / "cache", ignore_errors=True)
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
    return tally


def _try(store: Path, seed: int, tally: Tally) -> None:
    tally.tries += 1
    with faulty_server(store, seed) as server:
        try:
            remote = local_store(server.url)
            StoreIndex.load(remote).verify(remote, shards_of(remote))
            same = all(_same(*pair) for pair in zip(_batches(remote), _batches(store), strict=True))
        except Exception as error:
            tally.lost += 1
            tally.notes.append(f"{store.name}, seed {seed}, {server.broken}: {type(error).__name__}: {error}")
            return
    if not same:
        tally.silent += 1
        tally.notes.append(f"{store.name}, seed {seed}: other batches than those of the local store")


def _batches(store: Path) -> list[Any]:
    config = LoaderConfig(workers=2, prefetch=3, bucket=2)
    with StreamLoader(store, batch=16, seed=3, block_labels=1024, config=config) as loader:
        return list(islice(loader, loader.batches_per_epoch))


def _same(mine: Any, other: Any) -> bool:
    pairs = [(mine.token_ids_BT, other.token_ids_BT), (mine.instance_B, other.instance_B)]
    pairs.append((mine.positives.label_P, other.positives.label_P))
    return all(torch.equal(left, right) for left, right in pairs)
