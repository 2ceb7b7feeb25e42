"""A store behind a server that fails three answers of ten: the batches are those of the local store, in their order.

One that gives a wrong byte with a whole answer is found out.
"""

import http.server
import os
import random
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import BACKENDS, INDEX_NAME, StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.remote import RemoteFolder, local_store, shards_of
from elmo_stream.errors import CorruptError
from tests.torture.materials import make_store
from tests.torture.tally import Tally

SHARE = 0.3
FAULTS = ("503", "reset", "cut", "slow")
GARBLED = "garbled"


class _Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and breaks answers at random; ``server.chance`` draws one of ``server.faults``, ``server.broken``
    counts them.
    """

    server: Any

    def end_headers(self) -> None:
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        with self.server.lock:
            fault = self.server.chance.choice(self.server.faults) if self.server.chance.random() < SHARE else ""
            if self.path.endswith(INDEX_NAME) and fault == GARBLED:  # there is nothing yet to compare it with
                fault = ""
            self.server.broken[fault] = self.server.broken.get(fault, 0) + 1
        if fault == "503":
            self.send_error(503)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self._send(fault)

    def _send(self, fault: str) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if fault == GARBLED:
            place = self.server.chance.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        if wanted is None:
            self.send_response(200)
        else:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        for start in range(0, len(content), 512):
            self.wfile.write(content[start : start + 512])
            if fault == "slow" and start < 2048:
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
def faulty_server(folder: Path, seed: int, faults: Sequence[str] = FAULTS) -> Iterator[Any]:
    """Serves ``folder`` over HTTP on the loopback interface; every other one gives parts of files, too."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Faulty, directory=str(folder)))
    server.chance, server.lock, server.broken, server.faults = random.Random(seed), threading.Lock(), {}, faults
    server.ranges = (seed + seed // 2) % 2 == 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try is an epoch over a store behind such a server, from opening it on; one behind a server that garbles; and
    its files in pieces from one that cuts answers.
    """
    tally = Tally()
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        stores = [make_store(folder, backend, rows=200) for backend in BACKENDS]
        for number in range(tries):
            for faults, same in ((FAULTS, _streamed), ((GARBLED,), _streamed), (("cut",), _in_pieces)):
                _try(stores[number % len(stores)], seed * 10_000 + number, faults, same, tally)
                shutil.rmtree(folder / "cache", ignore_errors=True)
            tally.tries += 1
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
    return tally


def _try(store: Path, seed: int, faults: Sequence[str], is_same: Callable[[Path, str], bool], tally: Tally) -> None:
    with faulty_server(store, seed, faults) as server:
        try:
            same = is_same(store, server.url) and not server.broken.get(GARBLED)
        except Exception as error:
            if faults == (GARBLED,) and isinstance(error, CorruptError) and "its checksum differs" in str(error):
                return
            tally.lost += 1
            tally.notes.append(f"{store.name}, seed {seed}, {server.broken}: {type(error).__name__}: {error}")
            return
    if not same:
        tally.silent += 1
        tally.notes.append(f"{store.name}, seed {seed}, {faults}: other data than those of the local store")


def _streamed(store: Path, url: str) -> bool:
    """Whether the store behind a URL verifies and gives the batches of the local one."""
    remote = local_store(url)
    StoreIndex.load(remote).verify(remote, shards_of(remote))
    return all(_same(*pair) for pair in zip(_batches(remote), _batches(store), strict=True))


def _in_pieces(store: Path, url: str) -> bool:
    """Whether every file of the training split, read a quarter at a time, is the local one."""
    for path in (path for path in (store / "train").rglob("*") if path.is_file()):
        with RemoteFolder(f"{url}/{path.relative_to(store).as_posix()}").open("rb") as stream:
            if b"".join(iter(partial(stream.read, path.stat().st_size // 4 + 1), b"")) != path.read_bytes():
                return False
    return True


def _batches(store: Path) -> list[Any]:
    config = LoaderConfig(workers=2, prefetch=3, bucket=2)
    with StreamLoader(store, batch=16, seed=3, block_labels=1024, config=config) as loader:
        return list(islice(loader, loader.batches_per_epoch))


def _same(mine: Any, other: Any) -> bool:
    pairs = [(mine.token_ids_BT, other.token_ids_BT), (mine.instance_B, other.instance_B)]
    pairs.append((mine.positives.label_P, other.positives.label_P))
    return all(torch.equal(left, right) for left, right in pairs)
