"""The few places where operating systems differ."""

import os
import sys
from pathlib import Path
from typing import IO

WINDOWS = sys.platform == "win32"


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if WINDOWS:
        if path.is_dir():
            return  # Windows has no way to flush a folder, and its renames are journalled
        descriptor = os.open(path, os.O_RDWR)
    else:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(stream: IO[str]) -> bool:
    """Lock an open file against other processes; false when another one holds it. Ends with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
