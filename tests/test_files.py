"""Whoever writes after a kill cleans up; whoever fails to read says which file it was."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elmo_stream.data.arrays import save_array
from elmo_stream.data.readers.instance import InputFile
from elmo_stream.data.readers.unpack import UnpackTask, unpack_file
from elmo_stream.files import copy_listed, new_file, new_folder

_WRITER = """
import os, sys
from pathlib import Path
from elmo_stream.files import new_file, new_folder

with new_file(Path(sys.argv[1], "file")) as stream, new_folder(Path(sys.argv[1], "folder")) as folder:
    stream.write(b"half")
    (folder / "part").write_bytes(b"half")
    print("written", flush=True)
    sys.stdin.read()
"""
# A real file that can be opened and not be read, on Linux: nothing is mapped at the first address.
_UNREADABLE = Path("/proc/self/mem")


def _half_written(folder: Path) -> "subprocess.Popen[str]":
    """A process in the middle of writing ``file`` and ``folder``."""
    # Without coverage: a signal that arrives inside it leaves its lock held.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-c", _WRITER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell whether a process lives")
def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_another_is_writing_stays(tmp_path: Path) -> None:
    killed, working = _half_written(tmp_path), _half_written(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tmp_path / "other.tmp-notes").write_text("of the user")
    assert len(list(tmp_path.glob("f*.tmp-*"))) == 4
    with new_file(tmp_path / "file") as stream:
        stream.write(b"whole")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "part").write_bytes(b"whole")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if "tmp-" in name and str(working.pid) not in name] == ["other.tmp-notes"]
    assert len(left) == 5
    working.kill()
    working.communicate()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "part").read_bytes() == b"whole"


@pytest.mark.skipif(not _UNREADABLE.exists(), reason="needs a file whose reading fails, as Linux has one")
@pytest.mark.parametrize("packing", ["", "gzip"])
def test_a_file_that_cannot_be_read_is_named_and_not_the_one_that_is_written(tmp_path: Path, packing: str) -> None:
    source = tmp_path / "texts.gz"
    source.symlink_to(_UNREADABLE)
    with pytest.raises(OSError) as unpacked:
        unpack_file(UnpackTask(InputFile(source, source, packing), tmp_path / "unpacked"))
    with pytest.raises(OSError) as copied, new_folder(tmp_path / "copy") as folder:
        copy_listed(tmp_path, folder, {"texts.gz": {"bytes": 4, "sha256": ""}})
    for error in (unpacked.value, copied.value):
        assert (error.errno, error.filename) == (errno.EIO, os.fspath(source))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.gz"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a file that is always full")
def test_an_array_that_a_full_disk_cuts_short_is_an_error_with_its_name() -> None:
    with pytest.raises(OSError, match=r"No space left on device.*/dev/full"):
        save_array(Path("/dev/full"), np.arange(7))
