"""How much memory a piece of work took at its peak, of the whole process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elmo_stream.system import resident_bytes

MOST_BYTES = 512 << 20


@contextmanager
def grown_bytes() -> Iterator[Callable[[], int]]:
    """Yields what tells, during the work or behind it, by how much its peak lay above the memory held before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()

    def grown() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before

    yield grown
