"""A conversion that is killed loses only the part it was working on, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_stream.data.index import StoreIndex
from elmo_stream.errors import UserError

SCRIPT = """
import json, signal, sys
from pathlib import Path
from elmo_stream.data.shard import convert

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has switched off
    task = json.loads(sys.argv[1])
    convert(
        [Path(task["train"])], Path(task["out"]), test=[Path(task["test"])], workers=task["workers"],
        progress=lambda stage, done, total: print(stage, done, total, flush=True), **task["options"],
    )
"""


@pytest.fixture
def start(sample, tmp_path):
    """Starts a conversion in a process of its own, which prints a line after every part and shard."""
    script = tmp_path / "convert.py"
    script.write_text(SCRIPT)
    # Without coverage: a signal that arrives inside it leaves its lock held.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def start_process(out: Path, workers: int) -> subprocess.Popen:
        task = {
            "train": str(sample.train),
            "test": str(sample.test),
            "out": str(out),
            "workers": workers,
            "options": sample.options,
        }
        command = [sys.executable, str(script), json.dumps(task)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start_process


def finished(out: Path) -> dict[Path, tuple[int, int]]:
    """Identity of every shard and of every finished part in the scratch: a rewritten folder has another."""
    folders = [*out.glob("*/shard-?????"), *out.glob(".build/*-?????"), *out.glob("labels"), *out.glob("tokenizer")]
    complete = [folder for folder in folders if ".tmp-" not in folder.name]
    return {folder: (folder.stat().st_ino, folder.stat().st_mtime_ns) for folder in complete}


def test_killed_again_and_again_it_ends_with_the_same_bytes_and_repeats_nothing(start, sample_store, tree, tmp_path):
    out = tmp_path / "store"
    before: dict[Path, tuple[int, int]] = {}
    for lines in (1, 4, 6, 8, 11, 13):
        process = start(out, workers=1)
        seen = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        process.communicate()
        assert all(seen) and process.returncode == -signal.SIGKILL
        after = finished(out)
        assert before.items() <= after.items()
        with pytest.raises(UserError, match="unfinished conversion"):
            StoreIndex.load(out)
        before = after
    assert any(folder.name.startswith("shard-") for folder in before)
    last = start(out, workers=1)
    last.communicate()
    assert last.returncode == 0
    assert {key: value for key, value in before.items() if key.exists()}.items() <= finished(out).items()
    assert tree(out) == tree(sample_store)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_conversion(start, sample_store, sample, tree, tmp_path, number):
    out = tmp_path / "store"
    process = start(out, workers=2)
    assert process.stdout.readline().startswith("counting train")
    process.send_signal(number)
    # Workers hold the other end of this pipe too: it ends only when the last of them has ended.
    process.communicate(timeout=60)
    assert process.returncode != 0
    sample.convert(out)
    assert tree(out) == tree(sample_store)
