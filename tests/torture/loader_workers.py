"""Those who read data die or stall: the batches come in order, or training ends in time and names the shard."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.inspection import verify
from tests.torture.materials import make_store, write_corpus
from tests.torture.tally import Tally

_TIMEOUT = 0.5
_PATIENCE = 60.0


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Loaders whose shard stalls or is lost in any place, and conversions whose worker processes die or stall."""
    tally, chance = Tally(), random.Random(seed)
    store = make_store(folder, rows=400, rows_per_shard=32)
    attacks = [_stalled_for_ever, _stalled_for_a_while, _lost, _closed_in_the_middle, _killed_conversion]
    for number in range(tries):
        place = shutil.copytree(store, folder / "copy")
        before = _held()
        what = attacks[number % len(attacks)]
        tally.tries += 1
        try:
            wrong = what(place, chance) or _left_behind(before)
        except Exception as error:
            tally.tracebacks += 1
            wrong = f"{type(error).__name__}: {error}"
        else:
            tally.lost += bool(wrong)
        if wrong:
            tally.notes.append(f"{what.__name__}, try {number}: {wrong}")
        shutil.rmtree(place)
    return tally


def _loader(store: Path, chance: random.Random, timeout: float = _TIMEOUT) -> StreamLoader:
    config = LoaderConfig(workers=chance.randint(1, 4), prefetch=chance.randint(1, 5), bucket=2, timeout=timeout)
    return StreamLoader(store, batch=16, seed=3, block_labels=1024, config=config)


def _some_file(store: Path, chance: random.Random) -> tuple[Path, str]:
    """A file of a shard, and the shard's name."""
    entry = chance.choice(StoreIndex.load(store).splits["train"].shards)
    return store / "train" / entry.name / chance.choice(sorted(entry.files)), entry.name


def _stall(path: Path) -> Callable[[], None]:
    """Make a file one whose reading hangs, as on a dead network; returns what lets it go on."""
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)

    def release() -> None:
        while True:  # a reader that opens it meanwhile gets the content
            with suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                os.set_blocking(descriptor, True)
                path.with_name("whole").write_bytes(content)  # for those who open it later
                path.with_name("whole").replace(path)
                with open(descriptor, "wb") as stream:
                    stream.write(content)
                return
            if not path.exists():
                return
            threading.Event().wait(0.001)

    return release


def _stalled_for_ever(store: Path, chance: random.Random) -> str:
    path, shard = _some_file(store, chance)
    release = _stall(path)
    start = time.monotonic()
    try:
        with _loader(store, chance) as loader:
            for _ in islice(loader, loader.batches_per_epoch):
                pass
        return "the stalled shard was not missed"
    except TimeoutError as error:
        seconds = time.monotonic() - start
        late = seconds > _PATIENCE
        return f"took {seconds:.0f} s" if late else "" if shard in str(error) else f"does not name {shard}: {error}"
    finally:
        release()
        _await(lambda: not _threads_of_loaders())


def _stalled_for_a_while(store: Path, chance: random.Random) -> str:
    with _loader(store, random.Random(0)) as whole:
        expected = [batch.instance_B for batch in islice(whole, whole.batches_per_epoch)]
    path, _ = _some_file(store, chance)
    helper = threading.Thread(target=_stall(path), daemon=True)
    helper.start()
    with _loader(store, chance, timeout=_PATIENCE) as loader:
        found = [batch.instance_B for batch in islice(loader, loader.batches_per_epoch)]
    helper.join()
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    return "" if same else "other batches than those of a loader that never stalled"


def _lost(store: Path, chance: random.Random) -> str:
    path, shard = _some_file(store, chance)
    path.unlink()
    try:
        with _loader(store, chance) as loader:
            for _ in islice(loader, loader.batches_per_epoch):
                pass
    except Exception as error:
        return "" if shard in str(error) else f"does not name {shard}: {error}"
    return "the lost file was not missed"


def _closed_in_the_middle(store: Path, chance: random.Random) -> str:
    with _loader(store, chance) as loader:
        for _ in islice(loader, chance.randrange(loader.batches_per_epoch)):
            pass
    return ""


def _killed_conversion(store: Path, chance: random.Random) -> str:
    """A worker process of a conversion is killed, or stopped and continued; the same command then finishes."""
    corpus = write_corpus(store / "more.jsonl", 4_000)
    out = store / "converted"
    options = ["--tokenizer", "train:100", "--workers", "2", "--rows-per-shard", "512"]
    command = [sys.executable, "-m", "elmo_stream", "shard", str(corpus), "--out", str(out), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    stop = chance.random() < 0.3
    while process.poll() is None and not (workers := _workers_of(process.pid)):
        threading.Event().wait(0.01)
    if process.poll() is None:
        threading.Event().wait(chance.uniform(0, 1.5))
        with suppress(ProcessLookupError):
            os.kill(workers[0], signal.SIGSTOP if stop else signal.SIGKILL)
        if stop:
            threading.Event().wait(0.2)
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGCONT)
    _, errors = process.communicate(timeout=_PATIENCE)
    if "Traceback" in errors:
        return errors
    if process.returncode and (stop or "worker process died" not in errors):
        return f"code {process.returncode}: {errors}"
    if process.returncode:
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE, env=environment)
    verify(out)
    return ""


def _workers_of(parent: int) -> list[int]:
    """Processes that a conversion spawned, but for the one that tracks resources."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def _threads_of_loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("elmo-loader")]


def _await(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not done() and time.monotonic() < deadline:
        threading.Event().wait(0.005)


def _held() -> dict[str, set[str]]:
    """What may leak: open files, shared memory, threads."""
    shared = Path("/dev/shm")
    return {
        "open files": set(os.listdir("/proc/self/fd")),
        "shared memory": set(os.listdir(shared)) if shared.is_dir() else set(),
        "threads": {str(thread.ident) for thread in _threads_of_loaders()},
    }


def _left_behind(before: dict[str, set[str]]) -> str:
    def left() -> dict[str, set[str]]:
        return {what: now - before[what] for what, now in _held().items() if now - before[what]}

    _await(lambda: not left())  # other processes come and go in the shared memory
    return ", ".join(f"{len(names)} {what} left" for what, names in left().items())
