"""Numba's compiler with a cache on disk that cannot go stale.

Numba renews a cached function when its own file changes, but not when a function or constant that it uses
from another file does. So the cache lives in a folder named by the content of all files that take part.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_SOURCES = ("rounding.py", "rounding_numba.py", "types.py", "cpu.py")


def _cache_folder() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:16]
    return str(Path(numba.config.CACHE_DIR or here / "__pycache__") / f"numba-{digest}")


def compiled(function: Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    """Compile with IEEE arithmetic (no fast-math), without the GIL, cached."""
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_folder()
    try:
        return numba.njit(function, parallel=parallel, nogil=True, cache=True)
    finally:
        numba.config.CACHE_DIR = previous
