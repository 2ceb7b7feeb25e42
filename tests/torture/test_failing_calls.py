"""A call that ``failing_calls.c`` overlooks would never fail in R3: it must count as many as strace sees."""

import re
from pathlib import Path

import pytest

from tests.torture.faults import VERBS, Bench
from tests.torture.tally import Unavailable
from tests.torture.tracing import require_strace

CALLS = "openat,mkdir,mkdirat,write,pwrite64,writev,ftruncate,rename,renameat,renameat2,fsync,fdatasync,read"
CALLS += ",pread64,getdents64,unlink,unlinkat,rmdir"
KINDS = "open mkdir write truncate rename sync read remove"


@pytest.mark.slow
def test_what_strace_sees_is_counted(tmp_path: Path) -> None:
    try:
        require_strace()
        bench = Bench(tmp_path)
    except Unavailable as error:
        pytest.skip(str(error))
    pattern = re.compile(rf'^\d+ +\w+\((AT_FDCWD<[^>]*>, "|\d+<|"){re.escape(str(bench.folder))}/')
    for verb in VERBS:
        lines = bench.trace(verb, ["-y", "-e", f"trace={CALLS}"])
        assert bench.count(verb, KINDS) == sum(bool(pattern.match(line)) for line in lines), verb
