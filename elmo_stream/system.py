"""The few places where operating systems differ."""

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Lock an existing folder against other processes while the context lasts; yields whether it was free.

    The lock ends with this process, however it ends. Holders of ``shared`` locks tolerate each other (but for Windows,
    which has no such locks). ``wait`` waits until the folder is free.
    """
    if sys.platform == "win32":
        import msvcrt

        with open(folder.with_name(f"{folder.name}.lock"), "a+b") as stream:
            try:
                msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:
                yield False
                return
            yield True
    else:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)


def process_lives(number: int) -> bool:
    """Whether a process of this machine has this number; on Windows, which cannot be asked by a signal, always."""
    if WINDOWS:
        return True
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def return_free_memory() -> None:
    """Give back to the system what the C library's heap holds and does not use, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell.

    What ``getrusage`` tells is on Linux inherited from the process that started this one.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
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


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system tells no other."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return peak_resident_bytes()


def free_memory_bytes() -> int:
    """Memory that this process can still take without swapping, limits of its control groups included.

    Where the system does not tell, half of the physical memory, or 4 GiB.
    """
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(found[1]) * 1024 if found else 4 << 30
    except OSError:
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        free = pages * mmap.PAGESIZE // 2 or 4 << 30
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """What the limits of the memory groups of this process (v1 and v2) and of those above leave."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        names = ("memory.max", "memory.current") if not controllers else _GROUP_V1
        group = root / place.lstrip("/")
        for folder in [group, *group.parents]:
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                yield limit - used + _reclaimable(folder)
            if folder == root:
                break


_GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _reclaimable(group: Path) -> int:
    """Page cache that a group gives back before it fails."""
    try:
        text = (group / "memory.stat").read_text()
    except OSError:
        return 0
    kinds = dict(line.split() for line in text.splitlines())
    return int(kinds.get("total_inactive_file", kinds.get("inactive_file", 0)))


def open_direct(path: Path) -> int:
    """Open a file for reading and writing past the page cache, where the file system can do that."""
    try:
        return os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDWR)


def reserve_file(path: Path, size: int) -> None:
    """Make a file whose bytes are all allotted on the disk; raises ``OSError`` that names it when they are not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            with open(descriptor, "wb", closefd=False) as stream:
                for start in range(0, size, 1 << 20):
                    stream.write(bytes(min(1 << 20, size - start)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def drop_cached(descriptor: int) -> None:
    """Flush an open file and give its page cache back, so that memory does not fill with what is read once."""
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
